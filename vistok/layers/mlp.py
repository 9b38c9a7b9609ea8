"""Gated feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def gated_width(dim: int, ratio: float = 4.0, multiple: int = 1) -> int:
    """Hidden width at which a gated MLP is as large as a plain one of `ratio`: two thirds, rounded up to a multiple."""
    hidden = int(dim * ratio * 2 / 3)
    return -(-hidden // multiple) * multiple


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where a and b are the halves of w12(x) (Shazeer, arXiv 2002.05202).

    Args:
        dim: Width, D.
        hidden: Width of a and b.
        bias: Whether both linear maps have a bias.
    """

    def __init__(self, dim: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)
