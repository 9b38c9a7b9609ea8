"""SCOPE: tokens that cover the others, weighted by saliency."""

from __future__ import annotations

from vistok.compress.budget import Budget
from vistok.compress.greedy import greatest_coverage
from vistok.compress.method import FeatureMethod, selection
from vistok.compress.reduction import Reduction
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "scope")
class SCOPE(FeatureMethod):
    """Greedy coverage gain times the class token's attention (arXiv 2510.24214), crop by crop; O(K N^2).

    Cosine of the features before the projector. Towers without a class token: the attention received.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. 64 is a setting of the paper for 576.
        alpha: Power of the saliency.
        reference: Count the positions anew, as the released code does.
    """

    needs = frozenset({"cls_row"})
    at = "tower"
    per_crop = True

    def __init__(self, *, keep: int | float | Budget = 64, alpha: float = 1.0, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)
        self.alpha = alpha

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """The `count` tokens with the greatest gains."""
        assert count is not None
        found = greatest_coverage(signals.features.unsqueeze(0), signals.row().unsqueeze(0), count, self.alpha)
        return selection(found[0], signals.length)
