"""A smaller picture: the baseline that costs the tower less as well."""

from __future__ import annotations

import torch

from vistok.compress.budget import Budget
from vistok.compress.grid import centre_of, combine, fit_grid
from vistok.compress.method import FeatureMethod
from vistok.compress.reduction import Reduction
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "downsample")
class Downsample(FeatureMethod):
    """The picture itself is made smaller before the tower, which then runs once, on fewer patches.

    The family resizes the pixels (bicubic, antialiased) and has the position table interpolated or the grid
    recomputed. Token (i, j) of the small grid takes the prompt position of the token it covers in the full grid.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. The grid has at most so many cells.
        reference: Count the positions anew.
    """

    needs = frozenset({"pixels", "grid"})

    def __init__(self, *, keep: int | float | Budget = 0.25, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)

    def promise(self, count: int, grid: tuple[int, ...] | None, length: int) -> int:
        """Cells of the grid that fits."""
        return int(torch.tensor(fit_grid(self.grid_of(grid, length), count)).prod())

    def anchors(self, grid: tuple[int, ...], count: int, device: torch.device | None = None) -> Reduction:
        """Where the tokens of the small picture go in the prompt of the full one."""
        small = fit_grid(grid, count)
        index = combine([centre_of(o, n, device) for o, n in zip(grid, small)], grid).unsqueeze(0)
        return Reduction(index, torch.ones_like(index), int(torch.tensor(grid).prod()))

    def compress(self, signals: Signals, count: int) -> Reduction:
        """Where the small picture's tokens go; the family has already made them."""
        return self.anchors(self.grid_of(signals.grid, signals.length), count, signals.features.device)
