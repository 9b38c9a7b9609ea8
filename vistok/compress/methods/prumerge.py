"""LLaVA-PruMerge and PruMerge+: outliers of the class token's attention, each with its neighbours folded in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.correlation import upper_fence
from vistok.compress.greedy import unit
from vistok.compress.grid import centre_of
from vistok.compress.method import FeatureMethod, selection
from vistok.compress.reduction import Reduction, from_dense
from vistok.compress.select import best
from vistok.compress.signals import Signals
from vistok.registry import register


def outlier_ratio(rows: Tensor) -> float:
    """Share of attention values above the upper fence, over all pictures given together, (B, N) or (N,)."""
    flat = rows.flatten()
    return float((flat > upper_fence(flat)).double().mean())


@register("method", "prumerge")
class PruMerge(FeatureMethod):
    """Adaptive selection and merging in front of the projector (arXiv 2403.15388, ICCV 2025).

    Attention of the class token in the last block, as one head of full width. Each kept token gets the `neighbours`
    tokens with the most similar keys added, weighted by their attention; what is not kept becomes one more token, the
    sum under the same weights. Towers without a class token: the attention received.

    Args:
        keep: None keeps as many tokens as there are outliers (values above the third quartile plus 1.5 interquartile
            ranges), plus the sum. An int per image, a float share or a `Budget` fixes the number, the sum included.
        neighbours: Tokens folded into each kept one.
        merge: False is the selection alone.
        reference: As released, for hosts of one grid per picture: int(N * share) tokens *plus* the sum, in the order
            of attention, positions counted anew; the share of outliers is that of the whole batch.
    """

    needs = frozenset({"cls_row", "keys"})
    at = "tower"
    per_crop = True
    blocks = (-1,)
    row = "one_head"
    rounding = "floor"
    door: ClassVar[dict[str, Any] | None] = {"merge": False}

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        neighbours: int = 32,
        merge: bool = True,
        reference: bool = False,
    ) -> None:
        super().__init__(keep=keep, reference=reference)
        if neighbours < 0:
            raise ValueError(f"neighbours={neighbours}: at least 0 tokens are folded in.")
        if reference and not merge:
            raise ValueError("The released code merges: leave out merge=False, or reference=True.")
        self.neighbours, self.merges = neighbours, merge
        self._share: float | None = None

    def wanted(self) -> frozenset[str]:
        """The released order makes sense without newlines only."""
        return self.needs | ({"one_grid"} if self.reference else set())

    @property
    def in_order(self) -> bool:
        """Released: by attention, the sum last."""
        return not self.reference

    def survey(self, rows: Sequence[Tensor]) -> None:
        """The released code decides on one share for a batch."""
        self._share = outlier_ratio(torch.cat(list(rows))) if rows and self.keep is None else None

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """Kept tokens with their neighbours, and the sum of the rest."""
        kept, left = self.chosen(signals.row(), count)
        if not self.merges:
            return selection(kept, signals.length)
        return self._merged(signals, kept, left, summed=count is None or self.reference or count > 1)

    def chosen(self, row: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        """Tokens to keep and those to sum up."""
        kept = best(row, self._number(row, count))
        return kept, _others(kept, len(row))

    def _number(self, row: Tensor, count: int | None) -> int:
        if count is None:
            if self.reference:
                return max(1, int(len(row) * (outlier_ratio(row) if self._share is None else self._share)))
            return max(1, int((row > upper_fence(row)).sum()))
        return count if self.reference or not self.merges else max(1, count - 1)

    def _merged(self, signals: Signals, kept: Tensor, left: Tensor, *, summed: bool) -> Reduction:
        """Candidates are the other kept tokens (twice, if a token was kept twice as released) and those left."""
        row, n, device = signals.row(), signals.length, kept.device
        keys = unit(signals.heads().flatten(1))
        others = torch.cat([kept, left])
        similarity = keys[kept] @ keys[others].T
        similarity.diagonal().fill_(-torch.inf)  # a kept token and itself
        near = others[similarity.topk(min(self.neighbours, len(others) - 1), dim=1).indices]
        summed = summed and len(left) > 0
        matrix = torch.zeros(len(kept) + summed, n, device=device)
        matrix[: len(kept)].scatter_add_(1, near, row[near])
        matrix[torch.arange(len(kept), device=device), kept] += 1
        anchors = kept
        if summed:
            matrix[-1, left] = row[left]
            anchors = torch.cat([kept, left[row[left].argmax()][None]])
        return from_dense(anchors, matrix)


@register("method", "prumerge_plus")
class PruMergePlus(PruMerge):
    """PruMerge with tokens sampled evenly over the picture besides: what the released forward pass runs.

    Args:
        keep: None adds three evenly spaced tokens for every outlier's share, as released. A number fixes the total:
            half by attention, half spread evenly over the others.
        neighbours: Tokens folded into each kept one.
        merge: False is the selection alone.
        reference: See `PruMerge`; with a share, sampled tokens may repeat attended ones, as released, and the last
            token of a picture is never sampled.
    """

    def chosen(self, row: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        """Attended and evenly spaced tokens."""
        n = len(row)
        if count is not None and not self.reference:
            total = self._number(row, count)
            first = best(row, -(-total // 2))
            others = _others(first, n)
            kept = torch.cat([first, others[centre_of(len(others), total - len(first), row.device)]])
            return kept, _others(kept, n)
        number = self._number(row, count)
        first = best(row, number)
        if count is None:
            step = max(1, int(int(n / number) / 3))
            spread = torch.arange(0, n - 1 if self.reference else n, step, device=row.device)
            kept = torch.cat([first, spread[~torch.isin(spread, first)]])
            return kept, _others(kept, n)
        step = int(n / number)
        kept = torch.cat([first, torch.arange(step // 2, n - 1, step, device=row.device)[:number]])
        return kept, _others(kept, n)[-(n - len(kept)) :]


def _others(kept: Tensor, n: int) -> Tensor:
    """Tokens that are not kept, ascending."""
    return torch.where(torch.ones(n, dtype=torch.bool, device=kept.device).scatter(0, kept, False))[0]
