"""FastV (arXiv 2403.06764): drop image tokens that the last prompt token attends to least."""

from __future__ import annotations

from torch import Tensor

from vistok.compress.method import ScheduledMethod, attention_received
from vistok.compress.view import View
from vistok.registry import register


@register("method", "fastv")
class FastV(ScheduledMethod):
    """One cut in front of layer K, by the attention of the last token in layer K-1, mean over heads.

    The paper speaks of the average attention over all rows; its code takes the last row, and so do we. Defaults are
    K = 2, R = 50 % of its README table (LLaVA-1.5, 57 % of the FLOPs). Positions stay; the number kept is rounded to
    even halves as the code does.

    Args:
        keep: Image tokens left: an int per image, a float share, or a `Budget`.
        layers: The layer K as a list of one; by default 2 of 32.
        ratios: Share left, by default (0.5,).
        reference: One budget over all images of a sample, as the released code counts.
    """

    published_layers = (2,)
    published_ratios = (0.5,)
    rounding = "round"

    def source_of(self, layer: int) -> int:
        """The layer before the cut."""
        return layer - 1

    def rows(self, view: View) -> Tensor:
        """The last token of every sample."""
        return view.last_row()

    def scores(self, view: View) -> Tensor:
        """Attention that the last token pays, mean over heads."""
        return attention_received(view)
