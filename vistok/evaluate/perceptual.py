"""Perceptual metrics: LPIPS with AlexNet and VGG16, DISTS."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok import assets
from vistok.evaluate.metric import Metric
from vistok.losses.base import freeze
from vistok.losses.perceptual import Lpips, Net, unpooled_stages
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


@register("metric", "dists")
class Dists(Metric):
    """DISTS (Ding et al., arXiv 2004.07728): structure and texture similarity of VGG16 features.

    Means (eq. 5) and covariances (eq. 6) of the picture itself and of five VGG16 stages with Hann-window pooling,
    weighted by the learnt alpha and beta. Measured at the pictures' own size; the authors shrink large pictures to a
    short side of 256 first.

    Args:
        rounding: Round to the 256 values a saved picture has before measuring.
        weights: A file with `alpha` and `beta`; None looks for it, see `vistok.assets.find`.
        vgg_weights: VGG16 weights, see `vistok.losses.perceptual.Lpips`.

    Raises:
        AssetError: No weights on this machine; the message lists where they can come from.
    """

    title = "DISTS"
    higher_is_better = False
    span = (0.0, 1.0)
    least = 32
    definition = "DISTS with VGG16, at the pictures' own size"
    alpha: Tensor
    beta: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, *, rounding: bool = True, weights: Path | None = None, vgg_weights: Path | None = None) -> None:
        super().__init__(rounding=rounding)
        path = assets.find("dists", weights)
        table = assets.read_tensors(path)
        self.vgg = Lpips(net="vgg", weights=vgg_weights)
        self.weights_sha256 = f"{assets.sha256(path)}+{self.vgg.weights_sha256}"
        scale = table["alpha"].sum() + table["beta"].sum()
        self.register_buffer("alpha", (table["alpha"] / scale).flatten().float())
        self.register_buffer("beta", (table["beta"] / scale).flatten().float())
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))
        freeze(self)

    def measure(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """See `Metric.measure`."""
        terms = [_similarities(x, y) for x, y in zip(self._maps(reconstruction), self._maps(target))]
        texture, structure = (torch.cat(t, 1) for t in zip(*terms))  # (B, 1475) each
        return 1.0 - (texture * self.alpha + structure * self.beta).sum(1)

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps, x = [images], (images - self.mean) / self.std
        for i, stage in enumerate(unpooled_stages(self.vgg)):
            x = _hann_pool(x) if i else x
            for conv in stage:
                x = F.relu(conv(x))
            maps.append(x)
        return maps


def _hann_pool(x: Tensor) -> Tensor:
    """Root of the weighted mean of squares, Hann window of 3, stride 2; the authors' replacement of max pooling."""
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, -1, -1)
    return (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


def _similarities(x: Tensor, y: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Texture and structure similarity of every channel, (B, C) each."""
    mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
    var_x = (x - mean_x[..., None, None]).square().mean((2, 3))
    var_y = (y - mean_y[..., None, None]).square().mean((2, 3))
    covariance = (x * y).mean((2, 3)) - mean_x * mean_y
    texture = (2.0 * mean_x * mean_y + epsilon) / (mean_x.square() + mean_y.square() + epsilon)
    return texture, (2.0 * covariance + epsilon) / (var_x + var_y + epsilon)
