"""Pixel losses."""

from __future__ import annotations

import torch.nn.functional as F
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


@register("loss", "smooth_l1")
class SmoothL1(nn.Module):
    """Per picture, the mean over channels and pixels of d^2 / (2 beta) where |d| < beta and |d| - beta / 2 beyond.

    Args:
        beta: Where the square ends. torch's default of 1 for pictures in [-1, 1] is 0.5 here, with twice the weight.
    """

    def __init__(self, *, beta: float = 0.5) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta must be positive, got {beta}; for 0 use the loss 'l1'.")
        self.beta = beta

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) -> (B,), float32.

        Raises:
            ValueError: The batches differ in shape or are no float pictures.
        """
        check_pair(reconstruction, target)
        found = F.smooth_l1_loss(reconstruction.float(), target.float(), reduction="none", beta=self.beta)
        return found.flatten(1).mean(1)
