"""What every picture metric is: update with batches, gather over processes, compute at the end.

    psnr = vistok.create("metric", "psnr")
    for pictures in loader:
        per_picture = psnr.update(tokenizer(pictures).images, pictures)
    psnr.gather()                # sums over all processes; nothing to do on one
    figure = psnr.compute()

State is float64 sums, so that the figure depends neither on the batch size nor on the number of processes beyond the
order of a float64 addition. A sampler that repeats pictures to fill up the last batch must not pass the repeats on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vistok.assets import AssetError
from vistok.config import create
from vistok.losses.base import check_pair


def build_metrics(
    names: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    size: tuple[int, int] | None = None,
    rounding: bool = True,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """Metrics by name, as far as this machine and the pictures' size allow.

    Args:
        names: Registered names, or specs `{name: ..., ...}` by the name to report them under.
        size: (H, W) of the pictures, None if it varies.
        rounding: See `Metric.update`.

    Returns:
        The metrics by name, and for those that cannot be measured here the reason, weights that are absent with the
        line that brings them, by name.

    Raises:
        KeyError: An unknown name.
    """
    built: dict[str, Metric] = {}
    skipped: dict[str, str] = {}
    specs = names if isinstance(names, Mapping) else {name: {"name": name} for name in names}
    for name, spec in specs.items():
        try:
            metric = create("metric", **{"rounding": rounding, **spec})
        except (AssetError, ImportError) as err:
            skipped[name] = str(err)
            continue
        if size is not None and min(size) < metric.least:
            skipped[name] = f"{metric.title} needs pictures of at least {metric.least} pixels, these have {min(size)}."
        else:
            built[name] = metric
    return built, skipped


def add_up(state: Tensor) -> None:
    """Sum a tensor over all processes, in place; nothing to do on one."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    on_device = state.cuda() if dist.get_backend() == "nccl" else state  # NCCL takes no CPU tensor
    dist.all_reduce(on_device)
    if on_device is not state:
        state.copy_(on_device)


class Metric(nn.Module):
    """A figure over pairs of pictures. A subclass implements `measure` and states the facts below.

    Attributes:
        title: Name for tables and axes.
        unit: Unit, empty for a bare number.
        higher_is_better: Direction.
        span: Smallest and largest possible value.
        decimals: Digits that mean something.
        least: Shortest side of a picture that it takes.
        per_picture: Whether `update` returns one value per picture (a Frechet distance has none).
        definition: One line that tells this definition from others of the same name.
        weights_sha256: Hash of the weight file it measures with, None if it has none.
    """

    title: ClassVar[str]
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool]
    span: ClassVar[tuple[float, float]]
    decimals: ClassVar[int] = 4
    least: ClassVar[int] = 1
    per_picture: ClassVar[bool] = True
    definition: ClassVar[str]
    weights_sha256: str | None = None
    total: Tensor
    count: Tensor

    def __init__(self, *, rounding: bool = True) -> None:
        super().__init__()
        self.rounding = rounding
        self.register_buffer("total", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def update(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Enter a batch.

        Both are clamped to [0, 1] and, unless `rounding` is off, rounded to the 256 values a saved picture has.

        Args:
            reconstruction: Pictures, float, (B, 3, H, W).
            target: The originals, same shape.

        Returns:
            The value of every picture, (B,), float32 or float64.

        Raises:
            ValueError: The batches differ in shape, are no float pictures, or are too small for this metric.
        """
        check_pair(reconstruction, target, least=self.least)
        with torch.autocast(target.device.type, enabled=False):
            values = self.measure(self._prepare(reconstruction), self._prepare(target))
        self.total += values.double().sum()
        self.count += len(values)
        return values

    def _prepare(self, images: Tensor) -> Tensor:
        images = images.float().clamp(0.0, 1.0)
        return (images * 255.0).round() / 255.0 if self.rounding else images

    def measure(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """The values of a batch, (B,), from float32 pictures in [0, 1]."""
        raise NotImplementedError

    def gather(self) -> None:
        """Add up the state of all processes. Call it once, after the last update, on every process."""
        for buffer in self.sums():
            add_up(buffer)

    def sums(self) -> list[Tensor]:
        """The state that adds up over processes."""
        return [self.total, self.count]

    def reset(self) -> None:
        """Forget everything seen."""
        for buffer in self.sums():
            buffer.zero_()

    def compute(self) -> float:
        """The figure over everything seen.

        Raises:
            ValueError: Nothing was seen.
        """
        if not self.count:
            raise ValueError(f"{self.title} has seen no picture: call update first.")
        return float(self.total / self.count)

    @property
    def label(self) -> str:
        """What the figure may be called, given what was seen; the title unless a metric knows better."""
        return self.title

    def details(self) -> dict[str, float]:
        """Further figures that fall out of the same pass."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """What the figure depends on, for JSON."""
        return {
            "definition": self.definition,
            "higher_is_better": self.higher_is_better,
            "unit": self.unit,
            "rounding": "uint8" if self.rounding else "none",
            "weights_sha256": self.weights_sha256,
        }
