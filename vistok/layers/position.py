"""Learnt position tables on other grids."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
