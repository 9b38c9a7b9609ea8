"""VisPruner: attended tokens first, then what is left without its near duplicates."""

from __future__ import annotations

import torch

from vistok.compress.budget import Budget
from vistok.compress.greedy import drop_duplicates
from vistok.compress.method import FeatureMethod, selection
from vistok.compress.reduction import Reduction
from vistok.compress.select import best
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "vispruner")
class VisPruner(FeatureMethod):
    """A share of the budget by the class token's attention, the rest by de-duplication (arXiv 2412.01818, ICCV 2025).

    The list of the rest starts in the order of attention; similarity is that of the features before the projector.
    Towers without a class token: the attention received.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. 128 is a setting of the paper for 576.
        important: Share of the budget that goes by attention.
        step: Tokens removed in a round of de-duplication.
        reference: Count the positions anew, as the released code does.
    """

    needs = frozenset({"cls_row"})
    at = "tower"
    per_crop = True

    def __init__(
        self, *, keep: int | float | Budget = 128, important: float = 0.5, step: int = 8, reference: bool = False
    ) -> None:
        super().__init__(keep=keep, reference=reference)
        if not 0 <= important <= 1:
            raise ValueError(f"important={important}: it is a share of the budget, in [0, 1].")
        if step < 1:
            raise ValueError(f"step={step}: at least one token goes in a round.")
        self.important, self.step = important, step

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """Important tokens, then diverse ones."""
        assert count is not None
        order = best(signals.row(), signals.length)
        first = int(count * self.important)
        x = signals.features.unsqueeze(0)
        diverse = drop_duplicates(x, order[None, first:], count - first, self.step)[0]
        return selection(torch.cat([order[:first], diverse]), signals.length)
