"""Sinusoidal features of the flow's time and their embedding."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", float, Tensor)


def shift_time(t: T, shift: float) -> T:
    """Move times towards the noise for shift > 1: s t / (1 + (s - 1) t) (SD3, arXiv 2403.03206, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def time_features(
    t: Tensor, dim: int = 256, *, max_period: float = 256.0, factor: float = 1000.0, max_time: float = 1.0
) -> Tensor:
    """Cosines, then sines, of a time at geometrically spaced frequencies, in float32.

    f_i = (factor / max_time) max_period^(-i / half), half = dim / 2. FlexTok has max_period 256; DiT, xAR and MingTok
    have 10,000. Arguments reach 1000 rad, so a time in half precision must not be handed over.

    Args:
        t: Times in 0..max_time, any shape.
        dim: Even number of features.
        max_period: Ratio of the highest to the lowest frequency.
        factor: Highest frequency for times up to 1.
        max_time: Largest time.

    Returns:
        (*t.shape, dim) float32.

    Raises:
        ValueError: An odd number of features.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"Time features come in pairs: dim must be even and at least 2, got {dim}.")
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float().unsqueeze(-1) * (factor / max_time) * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimeEmbedding(nn.Module):
    """Time features through Linear, SiLU, Linear.

    Args:
        dim: Width of the embedding, D.
        features: Sinusoidal features.
        max_period: See `time_features`.
    """

    def __init__(self, dim: int, *, features: int = 256, max_period: float = 256.0) -> None:
        super().__init__()
        self.features, self.max_period = features, max_period
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Times of any shape in [0, 1] -> (*t.shape, D)."""
        found = time_features(t, self.features, max_period=self.max_period)
        return self.mlp(found.to(self.mlp[0].weight.dtype))
