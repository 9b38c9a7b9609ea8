"""Pixel losses."""

from __future__ import annotations

from torch import Tensor, nn

from vistok.losses.base import check_pair
from vistok.registry import register


@register("loss", "mse")
class MeanSquaredError(nn.Module):
    """Mean squared error over channels and pixels, per picture (TiTok's and VQGAN's `l2`)."""

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) -> (B,), float32.

        Raises:
            ValueError: The batches differ in shape or are no float pictures.
        """
        check_pair(reconstruction, target)
        return (reconstruction.float() - target.float()).square().flatten(1).mean(1)


@register("loss", "l1")
class MeanAbsoluteError(nn.Module):
    """Mean absolute error over channels and pixels, per picture."""

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) -> (B,), float32.

        Raises:
            ValueError: The batches differ in shape or are no float pictures.
        """
        check_pair(reconstruction, target)
        return (reconstruction.float() - target.float()).abs().flatten(1).mean(1)


@register("loss", "log_mse")
class LogMeanSquaredError(nn.Module):
    """Natural logarithm of the mean squared error, per picture: what the mean PSNR over pictures measures.

    Pictures with small errors weigh as much as those with large ones; 0.23 of it is 1 dB.

    Args:
        floor: Added to the error, so that an exact reconstruction stays finite.
    """

    def __init__(self, *, floor: float = 1e-5) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) -> (B,), float32.

        Raises:
            ValueError: The batches differ in shape or are no float pictures.
        """
        check_pair(reconstruction, target)
        return ((reconstruction.float() - target.float()).square().flatten(1).mean(1) + self.floor).log()
