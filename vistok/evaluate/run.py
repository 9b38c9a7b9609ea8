"""Run a tokenizer over pictures: figures, the protocol behind them, and a page to look at."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.config import create
from vistok.distributed import all_objects, rank, world_size
from vistok.evaluate import protocol, report
from vistok.evaluate import reference as statistics
from vistok.evaluate.gallery import Example, Gallery
from vistok.evaluate.intervals import bootstrap_interval
from vistok.evaluate.metric import Metric, build_metrics
from vistok.evaluate.protocols import Protocol
from vistok.evaluate.rungs import Rungs, climb
from vistok.evaluate.usage import LARGEST_VOCABULARY, CodebookUsage
from vistok.hub import write_atomic
from vistok.image import read_batches
from vistok.tokenizers.base import Tokenizer
from vistok.tokens import NAMELESS, Tokens, overhead, packed_bytes, to_bytes

METRICS = ("psnr", "ssim", "lpips_alex")
GRID_PAIRS = 16
CELLS = 8
"""Stands for the model id where only a file's size matters."""
UNDRAWN = ("seconds", "data_wait", "skipped_steps", "skipped_samples")
"""Columns of a training log that say nothing as a curve."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        figures: Metric name -> value over all pictures.
        labels: Metric name -> what to print beside the value; it carries N where the figure depends on it.
        details: Metric name -> what it found besides, empty for most.
        intervals: Metric name -> ends of its 95 % bootstrap interval over pictures.
        usage: Codebook usage, perplexity and entropy (see `CodebookUsage.compute`); empty for continuous latents.
        rate: `tokens_per_picture`, `bits_per_token`, `bits_per_pixel`, `bytes_per_picture` (packed ids alone) and
            `file_bytes_per_picture` (with the header of a `.vtok` file); of a tokenizer with a prior also
            `coded_file_bytes_per_picture` (entropy-coded) and `saved_by_coding`, the share that this saves of the file.
        speed: Pictures per second of `encode` and `decode`, reading and measuring not counted.
        baselines: The same metrics' PSNR of simpler pictures: `flat_8x8_psnr`, every picture as 8x8 cells of its mean
            colours.
        pictures: Pictures measured.
        skipped: File -> why it could not be used.
        files: What was written, name -> path.
        unmeasured: Metric -> why it is left out: its weights are not here (with the line that brings them), or it needs
            larger pictures.
    """

    figures: dict[str, float]
    labels: dict[str, str]
    details: dict[str, dict[str, float]]
    intervals: dict[str, tuple[float, float]]
    usage: dict[str, float]
    rate: dict[str, float]
    speed: dict[str, float]
    baselines: dict[str, float]
    pictures: int
    skipped: dict[str, str]
    files: dict[str, Path]
    unmeasured: dict[str, str] = field(default_factory=dict)

    @property
    def besides(self) -> dict[str, float]:
        """What metrics found besides their figures, e.g. `inception_score`; without the numbers of pictures."""
        return {key: value for found in self.details.values() for key, value in found.items() if key != "n"}


def evaluate(
    tokenizer: Tokenizer,
    pictures: Sequence[Path],
    *,
    metrics: Sequence[str] = METRICS,
    out: Path,
    batch: int = 16,
    command: str = "",
    history: Mapping[str, Sequence[float]] | None = None,
    name: str = "",
    num_tokens: int | None = None,
    lengths: Sequence[int] = (),
    text: str | Mapping[Path, str] | None = None,
    progress: Callable[[int], None] | None = None,
    conditions: Protocol | None = None,
    reference: Path | None = None,
) -> EvalResult:
    """Encode and decode pictures, measure, and write what others need to check the figures.

    Writes into `out`: `metrics.json` (figures with the whole protocol), `pictures.jsonl` (a line per picture),
    `reconstructions.png`, `report.html` (self-contained), and `curves.png` if there is a history. Files of an earlier
    evaluation in the same folder are replaced.

    Where torch.distributed is initialised, every process has to call it with the same arguments: each takes its share
    of the pictures, all get the result, and the first one writes.

    Args:
        tokenizer: The model; it is put into eval mode for the time being.
        pictures: Picture files; `tokenizer.preprocess` is applied. Files that cannot be read are skipped and named.
        metrics: Registered metrics. One whose weights are not on this machine, or that needs larger pictures, is left
            out and named, never replaced.
        out: Folder for the results.
        batch: Pictures at once.
        command: Command that repeats the evaluation; empty for that of this process.
        history: Columns of a training log (`step` is the x axis); its curves go into the report.
        name: What to call the model; its registered name if empty.
        num_tokens: Tokens per picture, for nested tokenizers.
        lengths: Further token counts to decode the same tokens at: a table and `ladder.png`. Nested tokenizers only.
        text: For tokenizers that read captions: one for all pictures, or that of each file.
        progress: Called with the number of pictures done in this process, after every batch.
        conditions: Protocol of a published table, whose metrics are measured besides.
        reference: Folder of pictures, or .npz of statistics, that Frechet distances are measured from in place of the
            originals.

    Raises:
        ValueError: No picture could be used, or a metric does not take this size.
        KeyError: Unknown metric.
    """
    root = _common_folder(pictures)
    specs: dict[str, Mapping[str, Any]] = {n: {"name": n} for n in metrics}
    measured = _Measured(tokenizer, {**specs, **(conditions.specs if conditions else {})}, root)
    where = tokenizer.preprocess, tokenizer.device
    statistics.use(measured.metrics, reference, *where, why=measured.left_out())
    keys = statistics.recall(measured.metrics, pictures, tokenizer.preprocess, root)
    broken: dict[Path, str] = {}
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        for files, images in read_batches(pictures[rank() :: world_size()], tokenizer.preprocess, batch, broken=broken):
            captions = [text.get(file, "") for file in files] if isinstance(text, Mapping) else text
            measured.update(files, images.to(tokenizer.device), num_tokens, captions)
            if progress is not None:
                progress(len(measured.lines))
        rungs = None
        if lengths and rank() == 0:
            title = name or tokenizer.registry_name
            single = [n for n, metric in measured.metrics.items() if metric.per_picture]
            rungs = climb(tokenizer, pictures, lengths, single, batch=batch, title=title)
    finally:
        tokenizer.train(was_training)
    broken = {path: why for part in all_objects(broken) for path, why in part.items()}
    measured.gather()
    statistics.remember(measured.metrics, keys)
    if not measured.lines:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in list(broken.items())[:3]) or "the list is empty"
        raise ValueError(f"There is no picture to evaluate on ({reasons}).")
    paths = _paths(out, bool(history)) | ({"ladder": Path(out) / "ladder.png"} if lengths else {})
    result = measured.result({str(path): why for path, why in broken.items()}, paths)
    if rank() > 0:
        return result
    used = [path for path in pictures if path not in broken]
    facts = protocol.collect(
        data=protocol.data_facts(str(root), used, root=root),
        model=protocol.model_facts(tokenizer, name or tokenizer.registry_name),
        preprocess=tokenizer.preprocess,
        metrics=measured.metrics,
        command_line=command or None,
        settings={
            "batch": batch,
            "processes": world_size(),
            "num_tokens": num_tokens or tokenizer.num_tokens,
            "precision": _precision(tokenizer),
            **({"text": text if isinstance(text, str) else "a caption per picture"} if text is not None else {}),
        },
    )
    for key, value in keys.items():
        facts["metrics"][key]["statistics"] = value
    if conditions is not None:
        facts["published"] = conditions.facts(len(used))
    _write(result, measured, facts, report.curves_from_log(_records(history or {})), rungs)
    return result


class _Measured:
    """Everything that adds up over the batches of one evaluation."""

    def __init__(self, tokenizer: Tokenizer, specs: Mapping[str, Mapping[str, Any]], root: Path) -> None:
        self.tokenizer = tokenizer
        self.root = root
        sized = tokenizer.preprocess.crop != "none"
        built, unmeasured = build_metrics(specs, size=tokenizer.preprocess.size if sized else None)
        self.unmeasured = {name: why for part in all_objects(unmeasured) for name, why in part.items()}
        self.metrics = {n: m.to(tokenizer.device) for n, m in built.items() if n not in self.unmeasured}
        ranking = [n for n, metric in self.metrics.items() if metric.per_picture]
        if not ranking:
            raise ValueError(
                "An evaluation needs a metric that has a value for every picture, e.g. psnr; got "
                f"{list(specs)}.{self.left_out()}"
            )
        self.gallery = Gallery(ranking[0], higher_is_better=self.metrics[ranking[0]].higher_is_better)
        self.flat: Metric = create("metric", "psnr").to(tokenizer.device)
        vocab = tokenizer.quantizer.vocab_sizes
        self.usage = CodebookUsage(vocab) if vocab and max(vocab) <= LARGEST_VOCABULARY else None
        self.lines: list[dict[str, Any]] = []
        self.seconds = {"encode": 0.0, "decode": 0.0}
        self.totals = {"tokens": 0.0, "bits": 0.0, "bytes": 0.0, "files": 0.0, "coded": 0.0, "pixels": 0.0}
        self.prior, self.portable = tokenizer.coder, tokenizer.portable

    def left_out(self) -> str:
        """Why metrics are left out, a sentence for each."""
        return "".join(f" {name} cannot be measured: {reason}" for name, reason in self.unmeasured.items())

    def update(self, files: Sequence[Path], images: Tensor, num_tokens: int | None, text: Any = None) -> None:
        """Enter a batch, (B, 3, H, W) in [0, 1] on the tokenizer's device."""
        tokens = self._timed("encode", lambda: self.tokenizer.encode(images, num_tokens, text=text))
        rebuilt = self._timed("decode", lambda: self.tokenizer.decode(tokens))
        found = {n: metric.update(rebuilt, images) for n, metric in self.metrics.items()}
        values = {n: v.tolist() for n, v in found.items() if self.metrics[n].per_picture}
        self.flat.update(flat_cells(images), images)
        self._count(tokens, images)
        for i, file in enumerate(files):
            row = {n: v[i] for n, v in values.items()}
            name = file.resolve().relative_to(self.root).as_posix()
            self.lines.append({"file": name, **row})
            self.gallery.add(Example.of(name, images[i], rebuilt[i], **row))

    def gather(self) -> None:
        """Take over what the other processes saw, so that all hold the same; lines in the order of their files."""
        for metric in (*self.metrics.values(), self.flat):
            metric.gather()
        if self.usage is not None:
            self.usage.gather()
        others = all_objects((self.lines, self.gallery, self.totals, self.seconds))
        self.lines = sorted((line for lines, *_ in others for line in lines), key=lambda line: line["file"])
        self.totals = {key: sum(totals[key] for _, _, totals, _ in others) for key in self.totals}
        self.seconds = {key: max(seconds[key] for *_, seconds in others) for key in self.seconds}
        self.gallery = others[0][1].merge(gallery for _, gallery, *_ in others[1:])

    def _timed(self, what: str, call: Callable[[], Any]) -> Any:
        wait: Callable[[], Any] = torch.cuda.synchronize if self.tokenizer.device.type == "cuda" else (lambda: None)
        wait()
        start = time.perf_counter()
        result = call()
        wait()
        self.seconds[what] += time.perf_counter() - start
        return result

    def _count(self, tokens: Tokens, images: Tensor) -> None:
        if self.usage is not None and tokens.ids is not None:
            self.usage.update(tokens.ids, tokens.mask)
        lengths = tokens.lengths.tolist()
        self.totals["tokens"] += sum(lengths)
        self.totals["bits"] += tokens.bits * sum(lengths)
        self.totals["bytes"] += sum(packed_bytes(k, tokens.vocab) for k in lengths) if tokens.vocab else 0
        if tokens.vocab:
            plain = dataclasses.replace(self.portable(tokens), text=None)  # captions count in no figure
            self.totals["files"] += sum(overhead(plain, k) for k in lengths)
            if self.prior is not None:
                self.totals["coded"] += sum(len(to_bytes(plain[i], NAMELESS, self.prior)) for i in range(len(plain)))
        self.totals["pixels"] += images.shape[0] * images.shape[-2] * images.shape[-1]

    def result(self, skipped: dict[str, str], files: dict[str, Path]) -> EvalResult:
        """The figures over everything seen."""
        count = len(self.lines)
        columns = {n: [line[n] for line in self.lines] for n, m in self.metrics.items() if m.per_picture}
        return EvalResult(
            figures={n: metric.compute() for n, metric in self.metrics.items()},
            labels={n: metric.label for n, metric in self.metrics.items()},
            details={n: found for n, metric in self.metrics.items() if (found := metric.details())},
            intervals={n: bootstrap_interval(values) for n, values in columns.items()},
            usage=self.usage.compute() if self.usage is not None else {},
            rate=self._rate(count),
            speed={f"{what}_images_per_s": count / max(s, 1e-9) for what, s in self.seconds.items()},
            baselines={f"flat_{CELLS}x{CELLS}_psnr": self.flat.compute()},
            pictures=count,
            skipped=skipped,
            files=files,
            unmeasured=self.unmeasured,
        )

    def _rate(self, count: int) -> dict[str, float]:
        tokens = self.totals["tokens"] / count
        if not self.totals["bits"]:
            return {"tokens_per_picture": tokens}
        packed, coded = (self.totals["bytes"] + self.totals["files"]) / count, self.totals["coded"] / count
        return {
            "tokens_per_picture": tokens,
            "bits_per_token": self.totals["bits"] / self.totals["tokens"],
            "bits_per_pixel": self.totals["bits"] / self.totals["pixels"],
            "bytes_per_picture": self.totals["bytes"] / count,
            "file_bytes_per_picture": packed,
            **({"coded_file_bytes_per_picture": coded, "saved_by_coding": 1 - coded / packed} if coded else {}),
        }


def flat_cells(images: Tensor, cells: int = CELLS) -> Tensor:
    """Every picture as a grid of flat cells of their mean colour, (B, 3, H, W) -> the same shape.

    What a reconstruction has to beat: it shows where which colour is, and nothing else.
    """
    means = F.adaptive_avg_pool2d(images, cells)
    return F.interpolate(means, size=images.shape[-2:], mode="nearest")


def _common_folder(files: Sequence[Path]) -> Path:
    """The innermost folder that holds all files."""
    return Path(os.path.commonpath([file.resolve().parent for file in files])) if files else Path()


def _precision(tokenizer: Tokenizer) -> str:
    return str(next(tokenizer.parameters()).dtype).removeprefix("torch.")


def _records(history: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    columns = {name: values for name, values in history.items() if name not in UNDRAWN}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _paths(out: Path, has_history: bool) -> dict[str, Path]:
    names = {
        "metrics": "metrics.json",
        "pictures": "pictures.jsonl",
        "grid": "reconstructions.png",
        "report": "report.html",
    }
    return {
        key: Path(out) / file for key, file in {**names, **({"curves": "curves.png"} if has_history else {})}.items()
    }


def _write(
    result: EvalResult,
    measured: _Measured,
    facts: Mapping[str, Any],
    curves: Sequence[report.Curve],
    rungs: Rungs | None,
) -> None:
    files = result.files
    files["metrics"].parent.mkdir(parents=True, exist_ok=True)
    table = {key: value for key, value in vars(result).items() if key != "files"}
    if rungs is not None:
        table["by_tokens"] = rungs.figures
        write_atomic(files["ladder"], rungs.png)
    write_atomic(files["metrics"], json.dumps({**table, "protocol": facts}, indent=2).encode())
    write_atomic(files["pictures"], "".join(json.dumps(line) + "\n" for line in measured.lines).encode())
    examples = measured.gallery.sampled()
    shown = [e for e in examples if e.original.shape == examples[0].original.shape][:GRID_PAIRS]
    report.save_grid(
        files["grid"],
        torch.stack([e.original for e in shown]).float() / 255,
        torch.stack([e.reconstruction for e in shown]).float() / 255,
        captions=[e.name for e in shown],
        title=_headline(result, str(facts["model"]["name"])),
    )
    if curves and "curves" in files:
        report.save_curves(files["curves"], curves)
    report.write_page(
        files["report"],
        title=f"{facts['model']['name']} on {result.pictures} pictures",
        command=str(facts["command"]),
        subtitle=f"{facts['data']['name']}",
        figures=[
            report.figure_of(metric, result.figures[n], result.intervals.get(n))
            for n, metric in measured.metrics.items()
        ],
        groups=measured.gallery.groups(),
        gallery=examples,
        curves=curves,
        tables=_tables(result) + ([rungs.table()] if rungs else []),
        panels={"Ladder of token counts": rungs.png} if rungs else {},
        protocol=facts,
        notes=_notes(result),
        ranked_by=measured.metrics[measured.gallery.metric].title,
    )


def _headline(result: EvalResult, name: str) -> str:
    rate = f", {result.rate['tokens_per_picture']:g} tokens"
    rate += f" = {result.rate['bytes_per_picture']:g} bytes" if "bytes_per_picture" in result.rate else ""
    return f"{name}{rate} per picture"


def _tables(result: EvalResult) -> list[report.Table]:
    facts = {**result.besides, **result.rate, **result.speed, **result.baselines}
    tables = [report.Table(title="Rate, speed and baseline", columns=("what", "value"), rows=_rows(facts), note=_FLAT)]
    if result.usage:
        tables.append(report.Table(title="Code book", columns=("what", "value"), rows=_rows(result.usage)))
    return tables


_FLAT = f"flat {CELLS}x{CELLS}: PSNR of the same pictures drawn as {CELLS}x{CELLS} cells of their mean colour."


def _rows(facts: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(key.replace("_", " "), value) for key, value in facts.items()]


def _notes(result: EvalResult) -> list[str]:
    missing = [f"{name} is left out. {why}" for name, why in result.unmeasured.items()]
    if not result.skipped:
        return missing
    named = "; ".join(f"{file}: {why}" for file, why in list(result.skipped.items())[:5])
    return [
        *missing,
        f"{len(result.skipped)} of {result.pictures + len(result.skipped)} files could not be used: {named}",
    ]
