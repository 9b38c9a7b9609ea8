"""FasterVLM: the tokens that the vision tower's class token attends to."""

from __future__ import annotations

from vistok.compress.budget import Budget
from vistok.compress.method import FeatureMethod, selection
from vistok.compress.reduction import Reduction
from vistok.compress.select import best
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "fastervlm")
class FasterVLM(FeatureMethod):
    """Ranks tokens by the class token's attention in the last block but one (arXiv 2412.01818 v1).

    Towers without a class token (SigLIP, Qwen): by the attention a token receives on average.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. 128 is a setting of the paper for 576.
        reference: Count the positions anew, as the released code does.
    """

    needs = frozenset({"cls_row"})
    per_crop = True

    def __init__(self, *, keep: int | float | Budget = 128, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """The `count` most attended tokens."""
        assert count is not None
        return selection(best(signals.row(), count), signals.length)
