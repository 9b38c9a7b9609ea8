"""`Signals`: what a `features` method sees of one grid of tokens, between tower and language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vistok.compress.crops import Crop


@dataclass(frozen=True, kw_only=True)
class Level:
    """What one block of the tower says about the tokens.

    Attributes:
        cls_row: Attention of the class token to these tokens, in the form the method asked for, float32, (N,). In
            towers without one: what they receive from all tokens.
        keys: Raw keys, (N, heads, d), if the method asked for them.
    """

    cls_row: Tensor
    keys: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Signals:
    """One grid of image tokens of one image.

    Attributes:
        features: Features, (N, D): in front of the projector if the method is `at` the tower, else behind it.
        grid: (h, w) or (t, h, w) with product N, None if the tokens lie on no grid.
        cls_row: Attention of the tower's class token to these tokens, (N,), if the method asked for it; see `Level`.
        keys: Keys in the tower, (N, heads, d), if the method asked for them.
        levels: The same of every block the method reads, in its order (`cls_row` and `keys` are those of the last).
        text: Embeddings of the sample's text tokens, (m, D), if the method asked for them.
        crop: Where these tokens lie in a picture of several crops, None in any other.
        class_token: The class token itself, as wide as the features, if the method asked for it.
    """

    features: Tensor
    grid: tuple[int, ...] | None
    cls_row: Tensor | None = None
    keys: Tensor | None = None
    levels: tuple[Level, ...] = ()
    text: Tensor | None = None
    crop: Crop | None = None
    class_token: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens, N."""
        return self.features.shape[0]

    def row(self) -> Tensor:
        """The class token's attention.

        Raises:
            ValueError: It was not given.
        """
        if self.cls_row is None:
            raise ValueError("This method ranks tokens by the tower's attention: give Signals(cls_row=...), (N,).")
        return self.cls_row

    def heads(self) -> Tensor:
        """The keys.

        Raises:
            ValueError: They were not given.
        """
        if self.keys is None:
            raise ValueError("This method compares tokens by the tower's keys: give Signals(keys=...), (N, heads, d).")
        return self.keys
