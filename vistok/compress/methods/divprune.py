"""DivPrune: the tokens that are farthest from each other."""

from __future__ import annotations

from vistok.compress.budget import Budget
from vistok.compress.greedy import farthest_points
from vistok.compress.method import FeatureMethod, selection
from vistok.compress.reduction import Reduction
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "divprune")
class DivPrune(FeatureMethod):
    """Max-min diversity of the projected features (arXiv 2503.02175, CVPR 2025); needs no attention and no text.

    O(KN) after the nearest neighbours are known. Newlines of high-resolution pictures are not candidates (the released
    code lets them compete and may drop them), and exact duplicates are never chosen twice.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. 0.098 is the ratio of the paper's tables.
        reference: Count the positions anew, as the released code does.
    """

    def __init__(self, *, keep: int | float | Budget = 0.098, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """The `count` farthest tokens."""
        assert count is not None
        return selection(farthest_points(signals.features.unsqueeze(0), count)[0], signals.length)
