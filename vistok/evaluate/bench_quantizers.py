"""`vistok bench quantizers`: every quantizer kind on the same toy autoencoder, at equal bits, on real photographs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.config import create
from vistok.evaluate.step_cost import measure_step
from vistok.quantizers.base import Quantizer

if TYPE_CHECKING:
    from rich.table import Table

PATCH = 8
SIDE = 4
"""Tokens per side of a crop: a crop of 32 x 32 pixels is a 4 x 4 grid of 8 x 8 patches, one token each."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One quantizer of the benchmark.

    Attributes:
        label: Name in the table.
        spec: The quantizer, `{name: ..., ...}`, at 10 bits a token (multiscale: a position).
        recommended: Whether we recommend this configuration: it has to end with 90 % of its ids in use.
    """

    label: str
    spec: Mapping[str, Any]
    recommended: bool = False


def _ema(codes: int, dim: int, threshold: float) -> dict[str, Any]:
    """VQ-EMA that starts from k-means and revives codes used less than a tenth of their share."""
    spec = {"name": "vq_ema", "codebook_size": codes, "dim": dim, "decay": 0.99, "kmeans_init": True}
    return {**spec, "dead_threshold": threshold}


ENTRIES: tuple[Entry, ...] = (
    Entry(label="vq", spec={"name": "vq", "codebook_size": 1024, "dim": 8}),
    Entry(label="vq l2", spec={"name": "vq", "codebook_size": 1024, "dim": 8, "l2_norm": True}),
    Entry(
        label="vq l2 rotation",
        spec={"name": "vq", "codebook_size": 1024, "dim": 8, "l2_norm": True, "gradient": "rotation"},
    ),
    Entry(label="vq l2 stochastic", spec={"name": "vq_stochastic", "codebook_size": 1024, "dim": 8}),
    Entry(label="clustering vq", spec={"name": "cvq", "codebook_size": 1024, "dim": 8}),
    Entry(label="ema vq, revival", spec=_ema(1024, 8, 0.05), recommended=True),
    Entry(label="ibq", spec={"name": "ibq", "codebook_size": 1024, "dim": 8}),
    Entry(label="simvq", spec={"name": "simvq", "codebook_size": 1024, "dim": 8}),
    Entry(
        label="residual ema vq 2 x 32",
        spec={"name": "residual", "layers": 2, "base": _ema(32, 8, 2.0)},
        recommended=True,
    ),
    Entry(
        label="grouped ema vq 2 x 32",
        spec={"name": "grouped_residual", "layers": 1, "groups": 2, "base": _ema(32, 4, 2.0)},
        recommended=True,
    ),
    Entry(label="multiscale 1 2 4", spec={"name": "multiscale", "codebook_size": 197, "dim": 8, "scales": [1, 2, 4]}),
    Entry(label="fsq 8 5 5 5", spec={"name": "fsq", "levels": [8, 5, 5, 5]}, recommended=True),
    Entry(label="fsq symmetric 4^5", spec={"name": "fsq_symmetric", "levels": [4] * 5}),
    Entry(label="lfq", spec={"name": "lfq", "dim": 10}),
    Entry(label="group lfq 2 x 5", spec={"name": "group_lfq", "dim": 10, "groups": 2}, recommended=True),
    Entry(label="bsq", spec={"name": "bsq", "dim": 10}),
    Entry(label="binary", spec={"name": "binary", "dim": 10, "num_bits": 10}),
    Entry(label="gaussian", spec={"name": "gaussian", "dim": 4}),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one quantizer reached.

    Attributes:
        label: Name in the table.
        spec: The quantizer.
        recommended: See `Entry`.
        bits: Bits per position; None for continuous latents.
        psnr: dB over all patches of the held-out photographs.
        usage: Share of ids in use over the last window of training (mean over groups); None for continuous latents.
        perplexity: Of the ids in that window; None for continuous latents.
        seconds: Of training.
        step_ms: Forward and backward of the quantizer alone on (8, 256, in_dim), the best of five, in milliseconds.
        peak_mb: Largest memory of tensors alive in that step, above its input, in MB.
        psnr_curve: (step, dB) while training.
    """

    label: str
    spec: Mapping[str, Any]
    recommended: bool
    bits: float | None
    psnr: float
    usage: float | None
    perplexity: float | None
    seconds: float
    step_ms: float
    peak_mb: float
    psnr_curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The benchmark's outcome and everything it depends on.

    Attributes:
        rows: One per quantizer.
        steps: Training steps.
        seed: Seed of weights and crops.
        photos: Number of photographs trained on and held out.
        torch: Version of torch.
        threads: CPU threads.
        device: Where it ran.
    """

    rows: tuple[Row, ...]
    steps: int
    seed: int
    photos: tuple[int, int]
    torch: str
    threads: int
    device: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def run(
    *,
    kinds: Sequence[str] | None = None,
    steps: int = 500,
    batch: int = 32,
    seed: int = 0,
    device: str = "cpu",
    photos: Path | None = None,
    progress: Callable[[Row], None] | None = None,
) -> Result:
    """Train every quantizer on the same toy autoencoder and measure it.

    A two-layer perceptron codes 8 x 8 patches of photographs, one token each, at 10 bits. Every fifth photograph is
    held out whole. This compares quantizers under one small budget; it does not rank them for large models.

    Args:
        kinds: Labels or registered names to run; None for all.
        steps: Training steps each; 500 take about two minutes of one CPU core in all.
        batch: Crops of 32 x 32 pixels a step (16 tokens each).
        seed: Seed of weights and crops, the same for each quantizer.
        device: Torch device.
        photos: Folder of JPEG files; None for the bundled photographs.
        progress: Called with each finished row.

    Raises:
        ValueError: An unknown kind, or fewer than five photographs.

    Example:
        >>> result = run(kinds=["fsq"], steps=20)
        >>> print_table(result)
    """
    entries = _chosen(kinds)
    train, held_out = _photographs(photos)
    rows = []
    for entry in entries:
        rows.append(_train(entry, train, held_out, steps=steps, batch=batch, seed=seed, device=device))
        if progress is not None:
            progress(rows[-1])
    return Result(
        rows=tuple(rows),
        steps=steps,
        seed=seed,
        photos=(len(train), len(held_out)),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=device,
    )


def _chosen(kinds: Sequence[str] | None) -> list[Entry]:
    if kinds is None:
        return list(ENTRIES)
    unknown = [k for k in kinds if not any(k in (e.label, e.spec["name"]) for e in ENTRIES)]
    if unknown:
        raise ValueError(f"No quantizer {unknown} in this benchmark. It has: {', '.join(e.label for e in ENTRIES)}.")
    return [e for e in ENTRIES if e.label in kinds or e.spec["name"] in kinds]


def _photographs(folder: Path | None) -> tuple[list[Tensor], list[Tensor]]:
    """Photographs as float (3, H, W) in [0, 1], shorter side 256; every fifth is held out."""
    import numpy as np
    from PIL import Image

    paths = sorted((folder or Path(__file__).parents[1] / "data" / "photos").glob("*.jpg"))
    if len(paths) < 5:
        raise ValueError(f"The benchmark needs at least 5 JPEG files and found {len(paths)} in {folder}.")
    pictures = []
    for path in paths:
        with Image.open(path) as file:
            picture = file.convert("RGB")
            scale = 256 / min(picture.size)
            picture = picture.resize(
                (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
            )
        pictures.append(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255)
    return [p for i, p in enumerate(pictures) if i % 5], pictures[::5]


class _Autoencoder(nn.Module):
    """Patches -> features -> quantizer -> patches, one token a patch."""

    def __init__(self, quantizer: Quantizer, width: int = 128) -> None:
        super().__init__()
        pixels = 3 * PATCH * PATCH
        self.encoder = nn.Sequential(
            nn.Linear(pixels, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, quantizer.in_dim)
        )
        # every discrete kind sees channels of mean 0 and variance 1; look-up free kinds need a normaliser
        discrete = bool(quantizer.vocab_sizes)
        self.norm = nn.BatchNorm1d(quantizer.in_dim, affine=False) if discrete else nn.Identity()
        self.quantizer = quantizer
        self.decoder = nn.Sequential(nn.Linear(quantizer.dim, width), nn.GELU(), nn.Linear(width, pixels))

    def forward(self, patches: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Patches (B, 16, 192) around 0 -> reconstruction and the quantizer's loss."""
        z = self.norm(self.encoder(patches).flatten(0, 1)).unflatten(0, patches.shape[:2])
        out = self.quantizer(z, grid=(SIDE, SIDE), generator=generator)
        return self.decoder(out.codes), out.loss


def _to_patches(crops: Tensor) -> Tensor:
    """(B, 3, 32, 32) in [0, 1] -> (B, 16, 192) around 0."""
    return F.unfold(crops * 2 - 1, PATCH, stride=PATCH).transpose(1, 2)


def _crops(pictures: Sequence[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Random crops, (count, 3, 32, 32)."""
    size = PATCH * SIDE
    found = []
    for index in torch.randint(len(pictures), (count,), generator=generator).tolist():
        picture = pictures[index]
        y, x = (int(torch.randint(n - size + 1, (1,), generator=generator)) for n in picture.shape[1:])
        found.append(picture[:, y : y + size, x : x + size])
    return torch.stack(found)


def _tiles(picture: Tensor) -> Tensor:
    """All whole 32 x 32 tiles of a picture, (tiles, 3, 32, 32)."""
    size = PATCH * SIDE
    tiles = picture.unfold(1, size, size).unfold(2, size, size)  # (3, rows, columns, 32, 32)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)


def _train(
    entry: Entry,
    train: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    steps: int,
    batch: int,
    seed: int,
    device: str,
) -> Row:
    torch.manual_seed(seed)
    quantizer: Quantizer = create("quantizer", **entry.spec)
    model = _Autoencoder(quantizer).to(device)
    crops = torch.Generator().manual_seed(seed)
    draws = torch.Generator(device).manual_seed(seed)
    optim = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 2e-3, total_steps=steps, pct_start=0.1)
    test = _to_patches(torch.cat([_tiles(p) for p in held_out])).to(device)
    curve = []
    start = time.perf_counter()
    for step in range(steps):
        patches = _to_patches(_crops(train, batch, crops)).to(device)
        rebuilt, extra = model(patches, draws)
        optim.zero_grad(set_to_none=True)
        (F.mse_loss(rebuilt, patches) + extra).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        schedule.step()
        if (step + 1) % max(1, steps // 10) == 0:
            curve.append((step + 1, _psnr(model, test)))
    seconds = time.perf_counter() - start
    step_ms, peak_mb = measure_step(quantizer, device=device)
    return _row(entry, quantizer, curve, seconds, step_ms, peak_mb)


def _row(
    entry: Entry, quantizer: Quantizer, curve: list[tuple[int, float]], seconds: float, step_ms: float, peak_mb: float
) -> Row:
    discrete = quantizer.usage is not None
    stats = quantizer.usage.summary() if quantizer.usage is not None else {}
    positions = SIDE * SIDE
    return Row(
        label=entry.label,
        spec=entry.spec,
        recommended=entry.recommended,
        bits=quantizer.bits * quantizer.num_ids(positions) / positions if discrete else None,
        psnr=curve[-1][1] if curve else math.nan,
        usage=float(stats["usage"]) if "usage" in stats else None,
        perplexity=float(stats["perplexity"]) if discrete else None,
        seconds=seconds,
        step_ms=step_ms,
        peak_mb=peak_mb,
        psnr_curve=tuple(curve),
    )


@torch.no_grad()
def _psnr(model: _Autoencoder, test: Tensor) -> float:
    model.eval()
    error = F.mse_loss(model(test)[0].clamp(-1, 1), test) / 4  # [-1, 1] -> [0, 1]
    model.train()
    return float(-10 * error.log10())


def make_table(result: Result) -> Table:
    """The result as a rich table, best reconstruction first."""
    from rich.table import Table

    title = f"Quantizers on 8x8 photo patches, {result.steps} steps, {result.photos[1]} held-out photographs"
    caption = "* recommended: at least 90 % of the ids in use"
    table = Table(title=title, caption=caption, box=None, pad_edge=False)  # fits 80 columns
    table.add_column("quantizer", no_wrap=True)
    for name in ("bits", "PSNR\ndB", "usage\n%", "perp-\nlexity", "train\ns", "step\nms", "peak\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(result.rows, key=lambda r: -r.psnr):
        table.add_row(
            row.label + (" *" if row.recommended else ""),
            "-" if row.bits is None else f"{row.bits:.1f}",
            f"{row.psnr:.2f}",
            "-" if row.usage is None else f"{100 * row.usage:.0f}",
            "-" if row.perplexity is None else f"{row.perplexity:.0f}",
            f"{row.seconds:.0f}",
            f"{row.step_ms:.1f}",
            f"{row.peak_mb:.1f}",
        )
    return table


def print_table(result: Result) -> None:
    """Print the table."""
    from rich.console import Console

    Console().print(make_table(result))


def plot(result: Result, path: Path) -> None:
    """Draw reconstruction over training and the usage of each quantizer, as PNG, SVG or PDF by the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for index, row in enumerate(result.rows):
        style = "-" if row.recommended else (":", "--")[index // 10 % 2]  # ten colours come round
        left.plot(*zip(*row.psnr_curve), label=row.label, linestyle=style)
    left.set(xlabel="training step", ylabel="PSNR of held-out photographs, dB")
    left.legend(fontsize=7, ncols=2)
    rows = [r for r in result.rows if r.usage is not None]
    colours = ["tab:blue" if r.recommended else "tab:gray" for r in rows]
    right.barh([r.label for r in rows], [100 * (r.usage or 0) for r in rows], color=colours)
    right.axvline(90, color="black", linewidth=0.8, linestyle="--")
    right.invert_yaxis()
    right.set(xlabel="ids in use, % (recommended in blue)", xlim=(0, 100))
    figure.savefig(path, dpi=130)
    plt.close(figure)
