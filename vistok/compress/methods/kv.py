"""Evicting image tokens from the cache after prefill: SnapKV (arXiv 2404.14469) and H2O (2306.14048) for pictures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.budget import Budget, HostShape, check_keep, solve_count
from vistok.compress.method import Decision, Method
from vistok.compress.reduction import Reduction, pack
from vistok.compress.select import top_in_segments
from vistok.compress.view import View
from vistok.registry import register


class CacheEviction(Method):
    """Keeps the keys of every image that received most attention; text always stays, and so does layer 0.

    The published methods evict from the whole prompt; a vision-language prompt is nearly all image, and its text is
    what the answer needs. Prefill costs what it costs without the method: only decoding and memory gain.

    Attributes:
        keep: Image tokens left in the cache: an int per image, a float share, or a `Budget`.
        heads: One choice for all heads of a layer, or each key/value head its `own`.
    """

    stages = frozenset({"decode"})

    def __init__(self, *, keep: int | float | Budget = 0.25, heads: Literal["shared", "own"] = "shared") -> None:
        check_keep(keep)
        if isinstance(keep, Budget) and (keep.flops is not None or keep.mean is not None):
            raise ValueError(f"{keep}: eviction leaves the prefill as it is. Give a count or a ratio.")
        self.keep, self.heads = keep, heads
        self.per_head = heads == "own"

    def evicted_layers(self, depth: int) -> range:
        """All but the first."""
        return range(1, depth)

    def quota(self, n: int, host: HostShape) -> int:
        """Tokens of an image of n that stay."""
        if isinstance(self.keep, float):
            return max(1, round(n * self.keep))
        if isinstance(self.keep, int):
            return min(self.keep, n)
        return solve_count(self.keep, n, host, lambda share: [n])

    def scores(self, view: View, received: Tensor) -> Tensor:
        """Score of every key from the mass it received, (B, H, L)."""
        raise NotImplementedError

    def evict(self, view: View, received: Tensor | None, host: HostShape) -> Decision:
        """Keep the best keys of every image."""
        assert received is not None
        quotas = [[min(self.quota(n, host), now) for n, now in zip(*rows)] for rows in zip(view.sizes, view.counts)]
        if quotas == view.counts:
            return Decision(reduction=None, counts=view.counts)
        mass = received if self.per_head else received.sum(1, keepdim=True)
        scores = self.scores(view, mass).double()
        heads = scores.shape[1]
        scores = scores.masked_fill(view.protect.unsqueeze(1), torch.inf).flatten(0, 1)
        segment, other = (m.repeat_interleave(heads, 0) for m in (view.segment, view.valid & ~view.image))
        keep = top_in_segments(scores, segment, [row for row in quotas for _ in range(heads)]) | other
        longest = max(text + sum(row) for text, row in zip(view.texts, quotas))
        picked = pack(keep, longest)
        return Decision(reduction=Reduction(picked.index, picked.sizes, picked.length), counts=quotas)


@register("method", "snapkv")
class SnapKV(CacheEviction):
    """Scores by the attention of the last tokens of the prompt, smoothed along the sequence.

    Args:
        keep: Image tokens left in the cache: an int per image, a float share, or a `Budget`.
        window: Tokens at the end of the prompt whose attention counts; image tokens among them stay.
        kernel: Width of the average pooling over neighbours, odd; 1 for none.
        heads: One choice for all heads of a layer (`shared`), or each key/value head its `own`.
    """

    def __init__(
        self,
        *,
        keep: int | float | Budget = 0.25,
        window: int = 16,
        kernel: int = 5,
        heads: Literal["shared", "own"] = "shared",
    ) -> None:
        super().__init__(keep=keep, heads=heads)
        if window < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"window={window} has to be at least 1 and kernel={kernel} odd and at least 1.")
        self.last, self.kernel = window, kernel

    def window(self, view: View) -> Tensor:
        """The last tokens of every sample."""
        from_end = view.valid.flip(1).cumsum(1).flip(1)
        return view.valid & (from_end <= self.last)

    def scores(self, view: View, received: Tensor) -> Tensor:
        """Smoothed mass; the window's own image tokens first."""
        smooth = F.avg_pool1d(received, self.kernel, stride=1, padding=self.kernel // 2)
        return smooth.masked_fill(self.window(view).unsqueeze(1), torch.inf)


@register("method", "h2o")
class H2O(CacheEviction):
    """Heavy hitters: scores by the attention of all tokens of the prompt, read in chunks of query rows.

    Decided once at prefill. The chunks make it linear in memory, but every pair of tokens is still looked at: the
    dearest method here.

    Args:
        keep: Image tokens left in the cache: an int per image, a float share, or a `Budget`.
        normalise: Divide by the number of tokens that could see a key; the plain sum favours early tokens.
        heads: One choice for all heads of a layer (`shared`), or each key/value head its `own`.
    """

    def __init__(
        self,
        *,
        keep: int | float | Budget = 0.25,
        normalise: bool = False,
        heads: Literal["shared", "own"] = "shared",
    ) -> None:
        super().__init__(keep=keep, heads=heads)
        self.normalise = normalise

    def window(self, view: View) -> Tensor:
        """Every token."""
        return view.valid

    def scores(self, view: View, received: Tensor) -> Tensor:
        """Mass, per seeing token if asked for."""
        if not self.normalise:
            return received
        seen_by = view.valid.flip(1).cumsum(1).flip(1).clamp_min(1)
        return received / seen_by.unsqueeze(1)
