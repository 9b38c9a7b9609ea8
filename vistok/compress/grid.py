"""Grids of tokens: smaller grids of the same shape, and which old token stands for a new one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fit_grid(grid: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The largest grid of about the same aspect ratio with at most `count` tokens; frames stay as many as possible.

    Args:
        grid: (h, w) or (t, h, w).
        count: At least 1.
    """
    *frames, h, w = grid
    t = min(math.prod(frames), count)
    per_frame = count // t
    if per_frame >= h * w:
        return (*([t] if frames else []), h, w)
    side = max(1, min(h, math.floor(h * math.sqrt(per_frame / (h * w)) + 1e-9), per_frame))
    return (*([t] if frames else []), side, max(1, min(w, per_frame // side)))


def cell_of(old: int, new: int, device: torch.device | None = None) -> Tensor:
    """New cell of every old one along an axis, a balanced partition, (old,)."""
    return torch.arange(old, device=device) * new // old


def centre_of(old: int, new: int, device: torch.device | None = None) -> Tensor:
    """Old cell in the middle of every new one along an axis, (new,)."""
    return ((torch.arange(new, device=device) * 2 + 1) * old) // (2 * new)


def combine(axes: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """Flat index, row by row, of the product of one index per axis; `grid` is what the indices count in."""
    flat = torch.zeros((), dtype=torch.int64, device=axes[0].device)
    for axis, size in zip(axes, grid):
        flat = flat.unsqueeze(-1) * size + axis
    return flat.flatten()
