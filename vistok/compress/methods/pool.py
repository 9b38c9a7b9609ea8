"""Average pooling of the projected features: the baseline that beats many published methods."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from vistok.compress.budget import Budget
from vistok.compress.grid import cell_of, centre_of, combine, fit_grid
from vistok.compress.method import FeatureMethod
from vistok.compress.reduction import Reduction
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "pool")
class Pool(FeatureMethod):
    """Means over the cells of a smaller grid of the same shape, before the language model.

    Every token belongs to exactly one cell (a balanced partition, so cells differ by at most one row or column). The
    result takes the prompt position of the token in the middle of its cell.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. The grid has at most so many cells.
        reference: Count the positions anew, as code that pools before the prompt is built does.
    """

    merges = True
    needs = frozenset({"grid"})
    door: ClassVar[dict[str, Any] | None] = None

    def __init__(self, *, keep: int | float | Budget = 0.25, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)

    def promise(self, count: int, grid: tuple[int, ...] | None, length: int) -> int:
        """Cells of the grid that fits."""
        return int(torch.tensor(fit_grid(self.grid_of(grid, length), count)).prod())

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """Means over cells."""
        assert count is not None
        grid = self.grid_of(signals.grid, signals.length)
        small = fit_grid(grid, count)
        device = signals.features.device
        cells = combine([cell_of(o, n, device) for o, n in zip(grid, small)], small)
        anchors = combine([centre_of(o, n, device) for o, n in zip(grid, small)], grid)
        sizes = torch.bincount(cells, minlength=len(anchors))
        return Reduction(
            index=anchors.unsqueeze(0),
            sizes=sizes.unsqueeze(0),
            length=signals.length,
            links=cells.view(1, -1, 1),
            weights=(1 / sizes[cells].float()).view(1, -1, 1),
        )
