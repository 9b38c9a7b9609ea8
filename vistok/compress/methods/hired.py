"""HiRED: a budget for every crop by how much of the overview's content lies in it."""

from __future__ import annotations

from collections.abc import Sequence

from vistok.compress.budget import Budget
from vistok.compress.crops import cells, content_counts, share_out
from vistok.compress.method import FeatureMethod, selection
from vistok.compress.reduction import Reduction
from vistok.compress.select import best
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "hired")
class HiRED(FeatureMethod):
    """The class token's attention in the first block shares the budget out, that in the last but one selects.

    arXiv 2408.10945 (AAAI 2025). The released code cuts the overview into strips of its token list where it means
    cells of the picture, and rounds every budget down; here cells are cells and budgets add up. A picture of one crop
    keeps its most attended tokens. Towers without a class token: the attention received.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. 0.2 is the rate of the released scripts.
        alpha: Share of the budget that goes to the overview.
        reference: Strips, rounding and new positions as in the released code. Budgets are still counted over the
            tokens that the host gives, that is without the padding around a picture.
    """

    needs = frozenset({"cls_row", "levels", "crops"})
    blocks = (0, -2)
    per_crop = True
    rounding = "floor"

    def __init__(self, *, keep: int | float | Budget = 0.2, alpha: float = 0.5, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)
        if not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha}: the overview's share of the budget lies in (0, 1).")
        self.alpha = alpha

    def budgets(self, parts: Sequence[Signals], count: int) -> list[int]:
        """The overview's share, then one budget for every crop."""
        whole, *crops = parts
        if not crops or whole.crop is None:
            return super().budgets(parts, count)
        assert whole.grid is not None and crops[0].crop is not None
        layout = crops[0].crop.layout
        full = min(int(count * self.alpha), whole.length)
        cell = cells((whole.grid[0], whole.grid[1]), layout, spatial=not self.reference)
        found = content_counts(whole.levels[0].cls_row, cell, layout[0] * layout[1], self.alpha).tolist()
        weights = [found[part.crop.number] for part in crops if part.crop is not None]
        rooms = [part.length for part in crops]
        if self.reference:
            rest = count - full
            return [full, *(min(int(rest * w / sum(found)), room) for w, room in zip(weights, rooms))]
        full = max(full, count - sum(rooms))
        return [full, *share_out(count - full, weights, rooms)]

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """The `count` most attended tokens."""
        assert count is not None
        return selection(best(signals.row(), count), signals.length)
