"""Adaptive layer norm: shifts, scales and gates that depend on a condition (DiT, arXiv 2212.09748)."""

from __future__ import annotations

from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """X (1 + scale) + shift; all broadcastable to (..., D)."""
    return x * (1 + scale) + shift


class Modulation(nn.Sequential):
    """SiLU and a linear map from a condition to several vectors; zero at the start, so that gated blocks do nothing.

    What the vectors are (gate, shift, scale) and their order is the user's: published systems differ.

    Args:
        dim: Width of the condition, D.
        chunks: Number of vectors.
        width: Width of each; D if None.
    """

    def __init__(self, dim: int, chunks: int, width: int | None = None) -> None:
        linear = nn.Linear(dim, chunks * (width or dim))
        super().__init__(nn.SiLU(), linear)
        self.chunks = chunks
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)

    def forward(self, condition: Tensor) -> Tensor:
        """(..., D) -> (..., chunks, width)."""
        return super().forward(condition).unflatten(-1, (self.chunks, -1))
