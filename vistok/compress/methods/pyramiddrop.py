"""PyramidDrop (arXiv 2410.17247): halve the image tokens at the end of every quarter of the model."""

from __future__ import annotations

from torch import Tensor

from vistok.compress.method import ScheduledMethod, attention_received
from vistok.compress.view import View
from vistok.registry import register


@register("method", "pyramiddrop")
class PyramidDrop(ScheduledMethod):
    """Cuts after layers 8, 16, 24 of 32 to 1/2, 1/4, 1/8 of the original tokens (lambda 0.5 of the paper's tables).

    The score is the attention that the last prompt token is about to pay in the *next* layer, mean over heads.

    Args:
        keep: Image tokens left after the last cut: an int per image, a float share, or a `Budget`; earlier cuts are
            rescaled.
        layers: Layers in front of which the cuts fall.
        ratios: Share of the original tokens left after each.
        reference: Positions renumbered after every cut and one budget over all images of a sample, as released.
    """

    published_layers = (8, 16, 24)
    published_ratios = (0.5, 0.25, 0.125)

    @property
    def renumber(self) -> bool:
        """The released code renumbers."""
        return self.reference

    def source_of(self, layer: int) -> int:
        """The layer about to run."""
        return layer

    def rows(self, view: View) -> Tensor:
        """The last token of every sample."""
        return view.last_row()

    def scores(self, view: View) -> Tensor:
        """Attention that the last token pays, mean over heads."""
        return attention_received(view)
