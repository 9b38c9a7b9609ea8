"""VisionZip: dominant tokens by the class token's attention, contextual tokens by merging the rest."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.greedy import unit
from vistok.compress.method import FeatureMethod
from vistok.compress.reduction import Reduction
from vistok.compress.select import best
from vistok.compress.signals import Signals
from vistok.registry import preset, register


def nearest_targets(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced targets in a list of tokens, and the target most like each token (a target its own).

    Args:
        keys: Keys of the list, (R, d), R >= count.
        count: Targets: numbers 0, s, 2s, ... with s = R // count. The end of the list is never one.

    Returns:
        Targets (count,), and for every token the number of its target (R,).
    """
    step = max(1, len(keys) // count)
    targets = torch.arange(count, device=keys.device) * step
    keys = unit(keys)
    label = (keys @ keys[targets].T).argmax(1)
    label[targets] = torch.arange(count, device=keys.device)
    return targets, label


@register("method", "visionzip")
class VisionZip(FeatureMethod):
    """Dominant and contextual tokens in front of the projector (arXiv 2412.04467, CVPR 2025).

    The tokens left over by attention are merged by the similarity of their keys (mean over heads), each group into
    its mean. Towers without a class token: the attention received.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. 64 is the paper's 54 + 10.
        contextual: How many of them are merged ones, per crop; by default 1 in 6.4, the paper's pairs 162 + 30,
            108 + 20 and 54 + 10.
        merge: False keeps the target of every group as it is: a pure selection.
        reference: As released, for hosts of one grid per picture: the class token is the first dominant token, a
            contextual token is the target *plus* the mean of the others (about twice the norm), positions are
            counted anew.
    """

    needs = frozenset({"cls_row", "keys"})
    at = "tower"
    per_crop = True
    door: ClassVar[dict[str, Any] | None] = {"merge": False}

    def __init__(
        self,
        *,
        keep: int | float | Budget = 64,
        contextual: int | None = None,
        merge: bool = True,
        reference: bool = False,
    ) -> None:
        super().__init__(keep=keep, reference=reference)
        if contextual is not None and contextual < 0:
            raise ValueError(f"contextual={contextual}: at least 0 tokens are merged ones.")
        if reference and not merge:
            raise ValueError("The released code merges: leave out merge=False, or reference=True.")
        self.contextual, self.merges = contextual, merge

    def wanted(self) -> frozenset[str]:
        """The released code needs the class token too, and pictures of one grid."""
        return self.needs | ({"class_token", "one_grid"} if self.reference else set())

    @property
    def in_order(self) -> bool:
        """The released order is: class token, dominant tokens, contextual tokens."""
        return not self.reference

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """Dominant tokens as they are, the others in groups."""
        assert count is not None
        row, n = signals.row(), signals.length
        merged = int(count / 6.4) if self.contextual is None else min(self.contextual, count - 1)
        dominant = best(row, count - merged - self.reference).sort().values
        left = torch.ones(n, dtype=torch.bool, device=row.device).scatter(0, dominant, False)
        rest = torch.where(left)[0]
        if merged == 0:
            targets, label = rest[:0], rest[:0]
        else:
            targets, label = nearest_targets(signals.heads().mean(1)[rest], merged)
        index = torch.cat([dominant, rest[targets]])
        links = torch.full((n,), -1, device=row.device)
        links[dominant] = torch.arange(len(dominant), device=row.device)
        weights = torch.ones(n, device=row.device)
        if merged and self.merges:
            links[rest] = len(dominant) + label
            weights[rest] = self._weights(label, targets)
        elif merged:
            links[rest[targets]] = len(dominant) + torch.arange(merged, device=row.device)
        if self.reference:  # the class token counts as one more input, behind the others, and comes first
            index = torch.cat([index.new_tensor([n]), index])
            links = torch.cat([torch.where(links >= 0, links + 1, -1), links.new_zeros(1)])
            weights = torch.cat([weights, weights.new_ones(1)])
        sizes = torch.zeros_like(index).scatter_add(0, links.clamp_min(0), (links >= 0).long())
        return Reduction(index[None], sizes[None], len(links), links.view(1, -1, 1), weights.view(1, -1, 1))

    def _weights(self, label: Tensor, targets: Tensor) -> Tensor:
        """Share of every token of the rest in its group."""
        members = torch.bincount(label, minlength=len(targets)).float()
        if not self.reference:
            return 1 / members[label]
        weights = 1 / (members - 1).clamp_min(1)[label]
        weights[targets] = 1
        return weights


# The dominant + contextual pairs of the paper's tables for LLaVA-1.5 (576 tokens).
preset("method", "visionzip_192", builder="visionzip", config={"keep": 192, "contextual": 30})
preset("method", "visionzip_128", builder="visionzip", config={"keep": 128, "contextual": 20})
preset("method", "visionzip_64", builder="visionzip", config={"keep": 64, "contextual": 10})
