"""Random dropping in front of the language model."""

from __future__ import annotations

import torch

from vistok.compress.budget import Budget
from vistok.compress.method import FeatureMethod
from vistok.compress.reduction import Reduction
from vistok.compress.select import hash_scores
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "random_features")
class RandomFeatures(FeatureMethod):
    """Keeps features by a seeded hash of their position, before the language model sees any; see `random`.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`.
        seed: Chooses which tokens stay.
        reference: Count the positions anew.
    """

    def __init__(self, *, keep: int | float | Budget = 0.5, seed: int = 0, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)
        self.seed = seed

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """The `count` places with the largest hash, ascending."""
        place = torch.arange(signals.length, device=signals.features.device)
        index = hash_scores(place, self.seed).sort(descending=True, stable=True).indices[:count].sort().values
        return Reduction(index.unsqueeze(0), torch.ones_like(index).unsqueeze(0), signals.length)
