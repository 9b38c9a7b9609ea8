"""Cascade token pruning after SpAtten (arXiv 2012.09852) in a vision tower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.reduction import Reduction, behind_prefix, take
from vistok.compress.vision import BlockView, StagedVisionMethod
from vistok.registry import register


@register("method", "cascade")
class Cascade(StagedVisionMethod):
    """Drops the tokens that have received least attention so far, summed over heads, queries and blocks.

    A token that went is gone in all later blocks (the cascade); its importance is the sum over the blocks it has seen.
    The paper does this for language models; its head pruning, value pruning and quantisation are hardware matters and
    left out. The schedule for a tower is ours: after the attention of blocks 3, 6 and 9 of 12 (from 0), 70 % each time.

    The sum over all queries costs another product of queries and keys in every block up to the last cut; `voters` takes
    that many evenly spaced queries instead.

    Args:
        keep: Patches left after the last cut (int, share or `Budget`); the cuts before follow.
        blocks: Blocks in which it cuts, from 0.
        ratios: Share of the patches left after each cut.
        voters: Query rows that vote, evenly spaced; all if None.
        restore: Full length after every block: tokens that went keep the state they left with.
    """

    needs = frozenset({"attention"})
    published_blocks = (3, 6, 9)
    published_ratios = (0.7, 0.49, 0.343)

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        blocks: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
        voters: int | None = None,
        restore: bool | None = None,
    ) -> None:
        super().__init__(keep=keep, blocks=blocks, ratios=ratios, proportional=False, restore=restore)
        if voters is not None and voters < 1:
            raise ValueError(f"voters={voters}: at least one query row has to vote, or None for all.")
        self.voters = voters

    def watches(self, layer: int, depth: int, start: int) -> bool:
        """Every block up to the last cut adds to the importance."""
        return any(self.active(i, depth, start) for i in range(layer, depth))

    def in_block(self, view: BlockView) -> Reduction | None:
        """Add up, and cut where a cut is due."""
        importance: Tensor = view.received(self.voters) + view.memory.get("importance", 0)
        view.memory["importance"] = importance
        if not self.active(view.layer, view.depth, view.start):
            return None
        rest = importance[:, view.prefix :]
        best = rest.sort(dim=1, descending=True, stable=True).indices[:, : self.quota(view)].sort(dim=1).values
        kept = Reduction(best, take(view.sizes[:, view.prefix :], best), rest.shape[1])
        found = behind_prefix(kept, view.prefix, view.sizes)
        view.memory["importance"] = take(importance, found.index)
        return found
