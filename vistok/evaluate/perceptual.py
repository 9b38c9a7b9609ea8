"""Perceptual metrics: LPIPS with AlexNet and VGG16, DISTS."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vistok.evaluate.metric import Metric
from vistok.losses.perceptual import Lpips, Net
from vistok.registry import register


class _LpipsMetric(Metric):
    higher_is_better = False
    span = (0.0, 2.0)
    least = 32
    net: Net

    def __init__(self, *, rounding: bool = True, weights: Path | None = None) -> None:
        super().__init__(rounding=rounding)
        self.network = Lpips(net=self.net, weights=weights)
        self.weights_sha256 = self.network.weights_sha256

    def measure(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """See `Metric.measure`."""
        return self.network(reconstruction, target)


@register("metric", "lpips_alex")
class LpipsAlex(_LpipsMetric):
    """LPIPS v0.1 with AlexNet, float32; weights are shipped in half precision (shifts it by less than 5e-5).

    Args:
        rounding: Round to the 256 values a saved picture has before measuring.
        weights: A weight file of your own, see `vistok.losses.perceptual.Lpips`.

    Raises:
        AssetError: No weights on this machine.
    """

    title = "LPIPS (alex)"
    definition = "LPIPS v0.1, AlexNet, at the pictures' own size"
    net = "alex"


@register("metric", "lpips_vgg")
class LpipsVgg(_LpipsMetric):
    """LPIPS v0.1 with VGG16, float32.

    Args:
        rounding: Round to the 256 values a saved picture has before measuring.
        weights: A weight file of your own, see `vistok.losses.perceptual.Lpips`.

    Raises:
        AssetError: No weights on this machine; the message lists where they can come from.
    """

    title = "LPIPS (vgg)"
    definition = "LPIPS v0.1, VGG16, at the pictures' own size"
    net = "vgg"
