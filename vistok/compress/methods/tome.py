"""ToMe (arXiv 2210.09461) and Turbo (arXiv 2407.11717): merging similar tokens in every block of a vision tower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.match import bipartite
from vistok.compress.reduction import Reduction
from vistok.compress.vision import BlockView, ScheduledVisionMethod, falling, rates, spread
from vistok.registry import register


def _half(n: int) -> int:
    """Fewest tokens that pairing can leave of n."""
    return n - n // 2


@register("method", "tome")
class ToMe(ScheduledVisionMethod):
    """Merges the r most similar pairs of tokens in every block, between attention and MLP, weighted by size.

    Similarity is the cosine of keys averaged over heads (before rotary positions). Released code drops LayerScale,
    leaves rotary models alone, merges registers and pools without sizes; here all of these are right, and in models
    that have none of them the result is the same.

    Args:
        r: Pairs per block: an int, `(r, inflection)` with -1 for a falling and 1 for a rising schedule, or a list.
        keep: Patches left after the last block (int, share or `Budget`); r then gives the shape of the schedule only.
        proportional: Proportional attention; off for masked autoencoders that were not trained with it.
        restore: Full length after every block, for dense prediction.
        reference: Order of tokens as released where there is no class token (by similarity).
    """

    merges = True
    needs = frozenset({"keys"})

    def __init__(
        self,
        *,
        r: int | Sequence[int | float] = 8,
        keep: int | float | Budget | None = None,
        proportional: bool = True,
        restore: bool | None = None,
        reference: bool = False,
    ) -> None:
        super().__init__(keep=keep, proportional=proportional, restore=restore)
        rates(r, len(r) if isinstance(r, Sequence) else 1)
        self.r, self.reference = r, reference

    def left(self, depth: int, start: int) -> list[int]:
        """Each block takes r, at most half of the patches."""
        shape = rates(self.r, depth)
        end = self.target(start)
        return falling(start, shape, _half) if end is None else spread(start, end, shape, _half)

    def in_block(self, view: BlockView) -> Reduction | None:
        """Match and merge."""
        merged = view.count - view.prefix - self.quota(view)
        return bipartite(
            view.metric,
            merged,
            prefix=view.prefix,
            sizes=view.sizes,
            penalty=self.penalty(view),
            ordered=not self.reference or view.prefix > 0,
        )

    def penalty(self, view: BlockView) -> Tensor | None:
        """What speaks against merging a token away, (B, N)."""
        return None


@register("method", "turbo")
class Turbo(ToMe):
    """ToMe with a second voice: tokens that the class token attends to go last.

    Pairs are ranked by cosine minus the semantic value of the token that would go, `weight * N * attention` (so that
    an average token has the value `weight` at any resolution). Released BLIP code uses 30 * alpha * attention and the
    LLaVA code 100 * alpha: `scale=30` or `scale=100` with `weight=alpha`; its alpha of 5 at 384 pixels is a weight of
    0.26 here. Towers without a class token use the attention that tokens receive.

    Args:
        r: As in ToMe; the released runs use 30 at 384 and 40 at 480 pixels.
        weight: Weight of the semantic value (alpha with `scale`); by default 0.25, and 5 with `scale`.
        scale: Published constant; None for the form that does not depend on resolution.
        decay: The value fades by this factor per merging block away from `centre`; 1 for no fading.
        centre: Merging block, from 0, where the value counts fully.
        threshold: Nothing is merged while fewer tokens than this are left (released: 40 in most tasks).
        keep: Patches left after the last block (int, share or `Budget`); r then gives the shape of the schedule only.
        proportional: Proportional attention.
        restore: Full length after every block, for dense prediction.
        reference: The published constant 30 if no `scale` is given, and the order of ToMe's code.
    """

    needs = frozenset({"keys", "cls_row"})

    def __init__(
        self,
        *,
        r: int | Sequence[int | float] = 8,
        weight: float | None = None,
        scale: float | None = None,
        decay: float = 1.0,
        centre: int = 0,
        threshold: int = 0,
        keep: int | float | Budget | None = None,
        proportional: bool = True,
        restore: bool | None = None,
        reference: bool = False,
    ) -> None:
        super().__init__(r=r, keep=keep, proportional=proportional, restore=restore, reference=reference)
        if threshold and keep is not None:
            raise ValueError(f"keep={keep} and threshold={threshold} both say where merging ends. Give one of them.")
        self.decay, self.centre, self.threshold = decay, centre, threshold
        self.scale = 30.0 if reference and scale is None else scale
        self.weight = weight if weight is not None else 0.25 if self.scale is None else 5.0

    def left(self, depth: int, start: int) -> list[int]:
        """As in ToMe, until the threshold; it counts the class token, as the released code does."""
        found = super().left(depth, start)
        if not self.threshold:
            return found
        left, now = [], start
        for r in rates(self.r, depth):
            now = now if now + 1 < self.threshold else max(now - r, _half(now))
            left.append(now)
        return left

    def penalty(self, view: BlockView) -> Tensor:
        """Semantic value of every token."""
        done = view.memory.setdefault("merging blocks", 0)
        view.memory["merging blocks"] = done + 1
        value = view.salience()
        strength = self.weight * self.decay ** abs(self.centre - done)
        found: Tensor = value * strength * (view.count if self.scale is None else self.scale)
        return found
