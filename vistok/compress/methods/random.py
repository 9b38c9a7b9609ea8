"""Random dropping: the baseline that every table must carry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.method import ScheduledMethod
from vistok.compress.select import hash_scores
from vistok.compress.view import View
from vistok.registry import register


@register("method", "random")
class Random(ScheduledMethod):
    """Keeps tokens by a seeded hash of their position inside the image, so a batch gives what single samples give.

    By default half of every image goes in front of the layer where FastV cuts (2 of 32), which makes it the speed
    ceiling to compare prefill methods with.

    Args:
        keep: Image tokens left: an int per image, a float share, or a `Budget`.
        layers: Layers in front of which tokens go; by default 2 of 32.
        ratios: Share left after each cut.
        seed: Chooses which tokens stay.
        reference: Count the budget over all images of a sample together.
    """

    published_layers = (2,)
    published_ratios = (0.5,)
    rounding = "round"

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        layers: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
        seed: int = 0,
        reference: bool = False,
    ) -> None:
        super().__init__(keep=keep, layers=layers, ratios=ratios, reference=reference)
        self.seed = seed

    def scores(self, view: View) -> Tensor:
        """The hash, the same at every cut, so that later cuts drop from what earlier ones left."""
        return hash_scores(view.place, self.seed)
