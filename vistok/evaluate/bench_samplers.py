"""`vistok bench samplers`: quality of a trained flow decoder against the number of network evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.config import create
from vistok.evaluate.grid import count_tokens
from vistok.flow import SAMPLERS, Sampler
from vistok.image import read_batches
from vistok.registry import nearest

EVALUATIONS = (1, 2, 4, 8, 16)
QUALITIES = ("psnr", "lpips_alex", "distance")


@dataclass(frozen=True, kw_only=True)
class SamplerBench:
    """Result of one run.

    Attributes:
        model: What was sampled.
        pictures: Pictures measured.
        tokens: Tokens kept of each.
        guidance: Guidance scale, None for the model's own.
        rows: One per sampler and budget: sampler, steps, evaluations, psnr, lpips_alex, and `distance`, the mean
            absolute difference to the samples of the reference.
        reference: What `distance` is to.
    """

    model: str
    pictures: int
    tokens: int
    guidance: float | None
    rows: list[dict[str, Any]]
    reference: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run(
    tokenizer: Any,
    pictures: Sequence[Path],
    *,
    samplers: Sequence[str] = ("euler", "ab2", "heun", "midpoint", "rk4"),
    evaluations: Sequence[int] = EVALUATIONS,
    tokens: int | None = None,
    guidance: float | None = None,
    name: str = "",
) -> SamplerBench:
    """Decode the same tokens from the same noise with every sampler at every budget of network evaluations.

    Args:
        tokenizer: A trained tokenizer with a flow decoder, in eval mode.
        pictures: Picture files.
        samplers: Names out of `vistok.flow.SAMPLERS`.
        evaluations: Budgets; a sampler takes as many steps as fit into each.
        tokens: Tokens kept; all if None.
        guidance: Guidance scale; the model's own if None.
        name: What to call the model.

    Raises:
        ValueError: No flow decoder, an unknown sampler, budgets that are too small, or no picture.
    """
    if not hasattr(tokenizer, "sampling"):
        raise ValueError(f"{tokenizer.registry_name} does not decode with a flow, so there is no sampler to choose.")
    for one in samplers:
        if one not in SAMPLERS:
            raise ValueError(f"No sampler named {one!r}. {nearest(one, SAMPLERS)}")
    budgets = {one: _affordable(SAMPLERS[one], evaluations) for one in samplers}
    if not any(budgets.values()):
        raise ValueError(f"No step of {', '.join(samplers)} fits into {list(evaluations)} network evaluations.")
    parts = [images for _, images in read_batches(pictures, tokenizer.preprocess, 16, broken={})]
    if not parts:
        raise ValueError("There is no picture to decode.")
    images = torch.cat(parts).to(tokenizer.device)
    made = tokenizer.encode(images, tokens)
    own = tokenizer.sampling

    def decode(sampler: str, steps: int) -> Tensor:
        tokenizer.sampling = dataclasses.replace(own, sampler=sampler, steps=steps)
        found: Tensor = tokenizer.decode(made, guidance=guidance)
        return found

    try:
        finest = 2 * max(evaluations)
        reference = decode("midpoint", finest)
        rows = []
        for sampler in samplers:
            for steps, asked in budgets[sampler].items():
                found = decode(sampler, steps)
                distance = float((found - reference).abs().mean())
                rows.append({"sampler": sampler, "steps": steps, "evaluations": asked, "distance": distance})
                rows[-1] |= _quality(found, images)
    finally:
        tokenizer.sampling = own
    return SamplerBench(
        model=name or tokenizer.registry_name,
        pictures=len(images),
        tokens=made.num_tokens,
        guidance=guidance,
        rows=rows,
        reference=f"midpoint, {finest} steps",
    )


def _affordable(sampler: type[Sampler], budgets: Sequence[int]) -> dict[int, int]:
    """Most steps within each budget of evaluations, and the evaluations they take."""
    taken = {steps: sampler(steps).evaluations for steps in range(1, max(budgets, default=0) + 1)}
    most = [max((steps for steps, asked in taken.items() if asked <= budget), default=0) for budget in budgets]
    return {steps: taken[steps] for steps in most if steps}


def _quality(found: Tensor, images: Tensor) -> dict[str, float]:
    values = {}
    for name in ("psnr", "lpips_alex"):
        metric = create("metric", name).to(images.device)
        metric.update(found, images)
        values[name] = metric.compute()
    return values


def plot(result: SamplerBench, path: Path) -> None:
    """Write the diagram: PSNR, LPIPS and distance to the finest samples against network evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (("psnr", "PSNR, dB"), ("lpips_alex", "LPIPS (AlexNet)"), ("distance", f"distance to {result.reference}"))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, (key, label) in zip(axes, panels):
        for sampler in dict.fromkeys(row["sampler"] for row in result.rows):
            line = [(row["evaluations"], row[key]) for row in result.rows if row["sampler"] == sampler]
            axis.plot(*zip(*line), marker="o", label=sampler)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="network evaluations per branch", ylabel=label)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[2].set_yscale("log")
    axes[0].legend()
    figure.suptitle(f"{result.model}, {result.pictures} pictures, {count_tokens(result.tokens)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
