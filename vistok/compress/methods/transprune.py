"""TransPrune (arXiv 2507.20630): tokens that the model's own modules hardly change can go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.method import ScheduledMethod, attention_received
from vistok.compress.score import Direction
from vistok.compress.select import segment_sum
from vistok.compress.view import View
from vistok.registry import preset, register


@register("method", "transprune")
class TransPrune(ScheduledMethod):
    """Token transition variation summed over the middle layers, plus the attention the instruction pays.

    The "High" setting of the paper's Table 1: cuts after layers 7, 9, 12 of 32 to 0.875, 0.625, 0.125 of the image;
    transitions summed from layer 7 on. Both terms are normalised over the image's tokens and added.

    Args:
        keep: Image tokens left after the last cut: an int per image, a float share, or a `Budget`.
        layers: Layers in front of which the cuts fall.
        ratios: Share of the original tokens left after each.
        score: Transitions (`ttv`), instruction attention (`iga`), or their sum.
        direction: `signed` is the released code's 1 - cosine, `abs` the paper's 1 - |cosine|; see `score.transition`.
        reference: Positions renumbered after every cut and one budget over all images of a sample, as released.
    """

    published_layers = (7, 9, 12)
    published_ratios = (0.875, 0.625, 0.125)

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        layers: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
        score: Literal["both", "ttv", "iga"] = "both",
        direction: Direction = "signed",
        reference: bool = False,
    ) -> None:
        super().__init__(keep=keep, layers=layers, ratios=ratios, reference=reference)
        self.score = score
        self.direction = direction

    @property
    def renumber(self) -> bool:
        """The released code renumbers."""
        return self.reference

    def accumulate(self, depth: int) -> range:
        """From the layer before the first cut to the layer before the last."""
        if self.score == "iga":
            return range(0)
        layers = self.cut_layers(depth)
        return range(layers[0] - 1, layers[-1])

    def source_of(self, layer: int) -> int | None:
        """The layer about to run, unless transitions alone decide."""
        return None if self.score == "ttv" else layer

    def rows(self, view: View) -> Tensor | None:
        """The text after the last image."""
        return None if self.score == "ttv" else view.text_after_images()

    def scores(self, view: View) -> Tensor:
        """Sum of the two terms, each normalised over the image."""
        total = torch.zeros(view.index.shape, device=view.index.device)
        if self.score != "iga":
            assert view.transitions is not None
            total = total + normalised(view.transitions, view)
        if self.score != "ttv":
            total = total + normalised(attention_received(view), view)
        return total


def normalised(values: Tensor, view: View) -> Tensor:
    """Values divided by their sum over each image, (B, L)."""
    return values / (segment_sum(values, view.segment, view.images) + 1e-8)


preset("method", "transprune_high", builder="transprune", config={"ratios": [0.875, 0.625, 0.125]})
# The paper's "Low" (1.19 TFLOPs) gives no ratios: these are inferred from its two FLOPs figures, not published.
preset("method", "transprune_low", builder="transprune", config={"ratios": [0.65, 0.25, 0.05]})
