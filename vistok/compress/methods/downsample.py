"""A smaller picture: the baseline that costs the tower less as well."""

from __future__ import annotations

from typing import Any, ClassVar

from vistok.compress.budget import Budget
from vistok.compress.method import FeatureMethod
from vistok.registry import register


@register("method", "downsample")
class Downsample(FeatureMethod):
    """The picture itself is made smaller before the tower, which then runs once, on fewer patches.

    The family resizes the pixels (bicubic, antialiased) and has the position table interpolated or the grid
    recomputed. Token (i, j) of the small grid takes the prompt position of the token it covers in the full grid.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. The picture becomes the largest that
            gives at most so many.
        reference: Count the positions anew.
    """

    needs = frozenset({"pixels", "grid"})
    door: ClassVar[dict[str, Any] | None] = None

    def __init__(self, *, keep: int | float | Budget = 0.25, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)
