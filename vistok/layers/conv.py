"""Convolutional building blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNormSiLU(nn.GroupNorm):
    """Group normalisation followed by SiLU in place."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        return F.silu(super().forward(x), inplace=not torch.is_grad_enabled())


def to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, h * w, D), row-major, as a feature map (B, D, h, w) in channels-last memory; copies nothing."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def to_sequence(x: Tensor) -> Tensor:
    """A feature map (B, D, h, w) as tokens (B, h * w, D), row-major."""
    return x.flatten(2).transpose(1, 2)
