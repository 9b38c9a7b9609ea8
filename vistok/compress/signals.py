"""`Signals`: what a `features` method sees of one grid of tokens, between tower and language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Signals:
    """One grid of image tokens of one image.

    Attributes:
        features: Projected features, (N, D).
        grid: (h, w) or (t, h, w) with product N, None if the tokens lie on no grid.
        cls_row: Attention of the tower's class token to these tokens, (N,), if the method asked for it.
    """

    features: Tensor
    grid: tuple[int, ...] | None
    cls_row: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens, N."""
        return self.features.shape[0]
