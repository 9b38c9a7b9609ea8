"""Position tables: learnt ones, on other grids too, and fixed ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def learned_table(rows: int, width: int) -> nn.Parameter:
    """A table of positions or tokens that is learnt, (rows, width), drawn at a deviation of width^-1/2."""
    return nn.Parameter(torch.randn(rows, width) * width**-0.5)


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], *, prefix: int = 0) -> Tensor:
    """Resize a learnt position table bicubically, without antialiasing.

    Args:
        table: (prefix + h * w, D), rows in row-major grid order after `prefix` special rows (class token).
        old: (h, w) it was trained on.
        new: (h, w) wanted.
        prefix: Rows at the front that are kept as they are.

    Returns:
        (prefix + new h * new w, D).

    Raises:
        ValueError: The table does not hold `old`.
    """
    if table.shape[0] != prefix + old[0] * old[1]:
        raise ValueError(
            f"A table of {table.shape[0]} rows does not hold a grid of {old[0]}x{old[1]} after {prefix} rows."
        )
    if old == new:
        return table
    grid = table[prefix:].float().T.reshape(1, -1, *old)  # (1, D, h, w)
    resized = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    rows = resized.flatten(2)[0].T.to(table.dtype)  # (new h * new w, D)
    return torch.cat([table[:prefix], rows])


def sincos_table(dim: int, grid: tuple[int, int]) -> Tensor:
    """The fixed 2D table [sin(r w), cos(r w), sin(c w), cos(c w)] of rows r and columns c, w_i = 10000^(-4 i / D).

    Args:
        dim: Width, D, a multiple of 4.
        grid: (h, w).

    Returns:
        (D, h, w) float32.

    Raises:
        ValueError: A width that is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"A 2D sin-cos table needs a width that is a multiple of 4, got {dim}.")
    w = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    sides = [(torch.arange(n, dtype=torch.float64) * w[:, None]) for n in grid]  # 2 x (D / 4, n)
    rows, columns = (torch.cat([side.sin(), side.cos()]) for side in sides)  # 2 x (D / 2, n)
    shape = (dim // 2, *grid)
    return torch.cat([rows[:, :, None].expand(shape), columns[:, None].expand(shape)]).float()
