"""Rate and distortion: a nested tokenizer against JPEG, WebP and AVIF at equal bytes, headers counted for all."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vistok.evaluate import lengths, protocol, report
from vistok.evaluate.metric import Metric, build_metrics
from vistok.hub import write_atomic
from vistok.image import read_batches, to_uint8
from vistok.tokenizers.base import Tokenizer
from vistok.tokens import Tokens

if TYPE_CHECKING:
    from PIL.Image import Image

SCALES = (1, 2, 4, 8)
CODECS: dict[str, dict[str, Any]] = {
    "JPEG": {"format": "JPEG", "optimize": True, "qualities": (*range(1, 21), *range(22, 96, 4))},
    "WebP": {"format": "WEBP", "method": 6, "qualities": (*range(0, 21), *range(22, 101, 4))},
    "AVIF": {"format": "AVIF", "speed": 6, "qualities": (*range(0, 61, 3), *range(65, 96, 10))},
}
CODECS["AVIF body+10"] = {**CODECS["AVIF"], "counted": "body"}
"""AVIF's media data and as many bytes as a `.vtok` has beside its ids: no file, but what the codec alone can do."""
BESIDE = 10
METRICS = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "dists", "effnet_cosine")
BUDGETS = (64, 112, 208, 256)
SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class RateDistortion:
    """What was found.

    Attributes:
        pictures: Pictures measured.
        rows: One per coder and budget: `coder`, `bytes` (the budget), `fit` (pictures for which a file fits),
            `mean_bytes` (of the files) and the metrics, means over the pictures that fit; None where not all fit.
        skipped: Metric or codec -> why it was left out.
        saving: Mean bytes of a full code packed and entropy-coded, empty without a prior.
        files: What was written.
    """

    pictures: int
    rows: list[dict[str, Any]]
    skipped: dict[str, str]
    saving: dict[str, float]
    files: dict[str, Path]


def codec_candidates(picture: np.ndarray, codec: str, largest: int) -> list[tuple[int, np.ndarray]]:
    """All files of a codec of at most `largest` bytes, over qualities and scales: (bytes, decoded at full size).

    A scaled picture is shrunk with Lanczos before coding and enlarged with bicubic afterwards.

    Args:
        picture: uint8, (H, W, 3).
        codec: A key of `CODECS`.
        largest: Bytes of the whole file.

    Raises:
        OSError: This Pillow was built without the codec.
    """
    from PIL import Image

    full, found = Image.fromarray(picture), []
    for scale in SCALES:
        size = (max(1, full.width // scale), max(1, full.height // scale))
        small = full if scale == 1 else full.resize(size, Image.Resampling.LANCZOS)
        for quality in CODECS[codec]["qualities"]:
            length, file = _saved(small, codec, quality)
            if length > largest:
                break  # the next quality is no smaller
            decoded = Image.open(file).convert("RGB")
            if scale > 1:
                decoded = decoded.resize(full.size, Image.Resampling.BICUBIC)
            found.append((length, np.asarray(decoded)))
    return found


def _saved(picture: Image, codec: str, quality: int) -> tuple[int, io.BytesIO]:
    """A file of a codec, after the number of its bytes that count."""
    options = {name: value for name, value in CODECS[codec].items() if name != "qualities"}
    whole, file = options.pop("counted", "file") == "file", io.BytesIO()
    picture.save(file, quality=quality, **options)
    return file.tell() if whole else BESIDE + _media(file.getvalue()), file


def _media(data: bytes) -> int:
    """Bytes inside the `mdat` boxes of an ISO base media file."""
    start, found = 0, 0
    while start + 8 <= len(data):
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        size = size or len(data) - start  # 0: to the end
        found += size - 8 if kind == b"mdat" else 0
        start += max(size, 8)
    return found


def smallest_file(picture: np.ndarray, codec: str) -> int:
    """Bytes of the smallest file of a codec, over all scales at the lowest quality.

    Args:
        picture: uint8, (H, W, 3).
        codec: A key of `CODECS`.

    Raises:
        OSError: This Pillow was built without the codec.
    """
    from PIL import Image

    full, lowest = Image.fromarray(picture), CODECS[codec]["qualities"][0]
    sizes = [(max(1, full.width // scale), max(1, full.height // scale)) for scale in SCALES]
    return min(_saved(full.resize(size, Image.Resampling.LANCZOS), codec, lowest)[0] for size in sizes)


def best_that_fits(picture: np.ndarray, files: Sequence[tuple[int, np.ndarray]], budget: int) -> Any:
    """The file of the highest PSNR among those of at most `budget` bytes; None if there is none."""
    fitting = [f for f in files if f[0] <= budget]
    error = [float(((f[1].astype(np.float64) - picture) ** 2).mean()) for f in fitting]
    return fitting[int(np.argmin(error))] if fitting else None


@torch.no_grad()
def run(
    tokenizer: Tokenizer,
    pictures: Sequence[Path],
    *,
    out: Path,
    budgets: Sequence[int] = BUDGETS,
    metrics: Sequence[str] = METRICS,
    codecs: Sequence[str] = tuple(CODECS),
    name: str = "",
    command: str = "",
) -> RateDistortion:
    """Code every picture with everything at every budget; write `rate_distortion.json`, a page and the curves.

    The tokenizer writes its whole `.vtok` file, entropy-coded where it has a prior and the range coder is installed,
    with as many tokens as fit. A codec gets, for every picture, the quality and scale of the best PSNR among the whole
    files that fit. All are measured on the pictures as the tokenizer's preprocessing cuts them, rounded to 8 bits.

    Raises:
        ValueError: A tokenizer that is not nested, budgets that are none or that no file fits into, or no picture
            that could be read.
    """
    if not budgets or min(budgets) < 1:
        raise ValueError(f"Budgets are numbers of bytes, at least 1 each, e.g. 64,112; got {list(budgets)}.")
    if not tokenizer.nested or not tokenizer.quantizer.vocab_sizes:
        raise ValueError(f"{name or tokenizer.registry_name} has one length only: a rate needs a nested tokenizer.")
    broken: dict[Path, str] = {}
    batches = [images for _, images in read_batches(pictures, tokenizer.preprocess, 16, broken=broken)]
    if not batches:
        raise ValueError(f"There is no picture to evaluate on ({'; '.join(broken.values()) or 'the list is empty'}).")
    originals = torch.cat(batches)
    built, skipped = build_metrics(metrics, size=tokenizer.preprocess.size)
    skipped |= {str(path): why for path, why in broken.items()}
    ours, saving = _ours(tokenizer, originals, budgets)
    coded = {name or tokenizer.registry_name: ours}
    for codec in codecs:
        try:
            coded[codec] = _theirs(originals, codec, budgets)
        except (OSError, KeyError) as err:
            skipped[codec] = f"this Pillow cannot write it ({err})"
    rows = [_row(coder, b, found[b], originals, built) for coder, found in coded.items() for b in budgets]
    if all(row["mean_bytes"] is None for row in rows):
        raise ValueError(f"Nothing has files of at most {max(budgets)} bytes for all pictures. Give larger budgets.")
    used = [p for p in pictures if p not in broken]
    facts = protocol.collect(
        data=protocol.data_facts("pictures", used),
        model=protocol.model_facts(tokenizer, name or tokenizer.registry_name),
        preprocess=tokenizer.preprocess,
        metrics=built,
        command_line=command or None,
        settings={"budgets": list(budgets), "scales": SCALES, "codec settings": {k: str(v) for k, v in CODECS.items()}},
    )
    files = {"json": out / "rate_distortion.json", "page": out / "rate_distortion.html", "curves": out / "curves.png"}
    result = RateDistortion(pictures=len(originals), rows=rows, skipped=skipped, saving=saving, files=files)
    _write(result, coded, originals, built, facts)
    return result


Coded = dict[int, list[tuple[int, Tensor] | None]]
"""Budget -> per picture the bytes of the file and the decoded picture (3, H, W) in [0, 1], None where none fits."""


def _ours(tokenizer: Tokenizer, originals: Tensor, budgets: Sequence[int]) -> tuple[Coded, dict[str, float]]:
    found: Coded = {b: [] for b in budgets}
    packed, coded = [], []
    for image in originals:
        tokens = tokenizer.encode(image[None].to(tokenizer.device))
        for b in budgets:
            k = _most(tokenizer, tokens, b)
            rebuilt = tokenizer.decode(tokens[:, :k])[0].cpu() if k else None
            found[b].append(None if rebuilt is None else (len(tokenizer.to_bytes(tokens[:, :k])), rebuilt))
        packed.append(len(tokenizer.to_bytes(tokens, coded=False)))
        coded.append(len(tokenizer.to_bytes(tokens)))
    saving = {"packed_bytes": statistics.mean(packed), "coded_bytes": statistics.mean(coded)}
    return found, saving if tokenizer.coder is not None else {}


def _most(tokenizer: Tokenizer, tokens: Tokens, budget: int) -> int:
    """Most tokens of one picture whose `.vtok` file has at most `budget` bytes; 0 if not one does."""
    try:
        return lengths.fitting(tokenizer, tokens, budget).num_tokens
    except ValueError:  # not even one
        return 0


def _theirs(originals: Tensor, codec: str, budgets: Sequence[int]) -> Coded:
    found: Coded = {b: [] for b in budgets}
    for image in to_uint8(originals).permute(0, 2, 3, 1).numpy():
        files = codec_candidates(image, codec, max(budgets))
        for b in budgets:
            best = best_that_fits(image, files, b)
            decoded = None if best is None else torch.from_numpy(best[1].copy()).permute(2, 0, 1).float() / 255
            found[b].append(None if best is None or decoded is None else (best[0], decoded))
    return found


def _row(coder: str, budget: int, coded: Any, originals: Tensor, metrics: dict[str, Metric]) -> dict[str, Any]:
    fit = [i for i, c in enumerate(coded) if c is not None]
    row: dict[str, Any] = {"coder": coder, "bytes": budget, "fit": len(fit), "mean_bytes": None}
    row |= dict.fromkeys(metrics)
    if len(fit) == len(coded):
        row["mean_bytes"] = statistics.mean(c[0] for c in coded)
        rebuilt = torch.stack([c[1] for c in coded])
        for name, metric in metrics.items():
            metric.reset()
            for x, y in zip(rebuilt.split(8), originals.split(8)):
                metric.update(x, y)
            row[name] = metric.compute()
    return row


def _write(
    result: RateDistortion, coded: dict[str, Coded], originals: Tensor, metrics: dict[str, Metric], facts: Any
) -> None:
    files = result.files
    files["json"].parent.mkdir(parents=True, exist_ok=True)
    table = {k: v for k, v in vars(result).items() if k != "files"}
    write_atomic(files["json"], json.dumps({**table, "protocol": facts}, indent=1).encode())
    curves = [
        report.Curve(
            title=metric.title,
            series={
                coder: [(r["bytes"], r[name]) for r in result.rows if r["coder"] == coder and r[name] is not None]
                for coder in coded
            },
            x_label="bytes",
            unit=metric.unit,
            log=False,
        )
        for name, metric in metrics.items()
    ]
    drawn = [c for c in curves if any(len(points) > 0 for points in c.series.values())]
    report.save_curves(files["curves"], drawn)
    columns = ("coder", "bytes", "files that fit", "mean bytes", *(m.title for m in metrics.values()))
    notes = [
        "A row with '-' has no file of that size for some of the pictures: no comparison is made, and none is won."
    ]
    if result.saving:
        notes.append(
            "Entropy coding: {packed_bytes:.0f} bytes packed, {coded_bytes:.0f} coded.".format(**result.saving)
        )
    notes += [f"Left out, {what}: {why}" for what, why in result.skipped.items()]
    report.write_page(
        files["page"],
        title=f"{facts['model']['name']}: rate and distortion on {result.pictures} pictures",
        command=str(facts["command"]),
        subtitle="whole files, headers counted for all",
        sheets=[_sheet(coded, originals)],
        curves=drawn,
        tables=[
            report.Table(title="At equal bytes", columns=columns, rows=[list(row.values()) for row in result.rows])
        ],
        protocol=facts,
        notes=notes,
    )


def _sheet(coded: dict[str, Coded], originals: Tensor) -> report.Sheet:
    """Every picture beside what each coder makes of it at every budget, a row per coder that has any file."""
    shown, rows = to_uint8(originals[:SHOWN]), []
    for i, original in enumerate(shown):
        beside: list[tuple[Tensor | None, str]] = [(original, "original")]
        for coder, found in coded.items():
            entries = [found[budget][i] for budget in found]
            if all(entry is None for entry in entries):
                continue
            cells = [(None, "") if e is None else (to_uint8(e[1]), f"{e[0]} bytes") for e in entries]
            rows.append((coder, [*beside, *cells]))
            beside = [(None, "")]
    budgets = next(iter(coded.values()))
    columns = ("", *(f"{budget} bytes" for budget in budgets))
    note = "An empty cell: the coder has no file that small for this picture. Coders without any are left out."
    return report.Sheet(title="Pictures at equal bytes", columns=columns, rows=rows, note=note)
