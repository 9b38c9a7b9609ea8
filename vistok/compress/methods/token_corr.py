"""Token-level correlation compression for documents: how many tokens a crop deserves, and which."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vistok.compress.budget import Budget
from vistok.compress.correlation import outliers, redundant, sampling_keys
from vistok.compress.method import FeatureMethod, first_tokens, selection
from vistok.compress.reduction import Reduction
from vistok.compress.select import best, hash_scores
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "token_corr")
class TokenCorr(FeatureMethod):
    """Patch-patch correlation says how many, class-patch correlation which (arXiv 2407.14439).

    A crop's information density is the share of tokens whose keys, in a low block, do not resemble many others. So
    many are sampled by the class token's attention there (local information), and the outliers of its attention in a
    deep block are added (global information). Adaptive: the number depends on the crop. The authors published no code;
    thresholds and layers are our defaults, to be tuned for a tower. Towers without a class token: attention received.

    Args:
        keep: None decides by content and leaves the overview of a picture in crops whole. An int per image, a float
            share or a `Budget` fixes the number: outliers first, then the sample.
        threshold: Cosine above which two keys resemble each other (tau).
        share: Share of all tokens that a redundant one resembles (f).
        factor: Interquartile ranges above the third quartile where outliers begin.
        deterministic: Take the most attended tokens instead of a sample.
        seed: Of the sample: a hash of the position, so that it does not depend on the batch.
        whole_overview: With `keep=None`, whether the overview stays as it is.
    """

    needs = frozenset({"cls_row", "keys", "levels"})
    blocks = (4, -2)
    per_crop = True

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        threshold: float = 0.7,
        share: float = 0.1,
        factor: float = 1.5,
        deterministic: bool = False,
        seed: int = 0,
        whole_overview: bool = True,
    ) -> None:
        super().__init__(keep=keep)
        self.threshold, self.share, self.factor = threshold, share, factor
        self.deterministic, self.seed, self.whole_overview = deterministic, seed, whole_overview

    def compress_image(self, parts: Sequence[Signals], count: int | None) -> list[Reduction]:
        """Crop by crop; the overview of several crops stays whole if the method decides."""
        if count is not None or not self.whole_overview:
            return super().compress_image(parts, count)
        whole = [part.crop is not None and part.crop.overview for part in parts]
        return [first_tokens(p, p.length) if w else self.compress(p, None) for p, w in zip(parts, whole)]

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """Sampled tokens and outliers."""
        if not signals.levels or signals.levels[0].keys is None:
            raise ValueError("token_corr reads two blocks of the tower: give Signals(levels=(low, deep)) with keys.")
        low, deep = signals.levels[0], signals.levels[-1]
        assert low.keys is not None
        noise = None if self.deterministic else hash_scores(torch.arange(signals.length), self.seed)
        draw = sampling_keys(low.cls_row.clamp_min(0), None if noise is None else noise.to(low.cls_row.device))
        apart = outliers(deep.cls_row, self.factor)
        if count is None:
            dense = ~redundant(low.keys.flatten(1).unsqueeze(0), self.threshold, self.share)
            local = best(draw, max(1, int(dense.sum())))
            return selection(torch.where(apart.scatter(0, local, True))[0], signals.length)
        ranked = torch.where(apart, deep.cls_row.double(), -torch.inf)
        first = best(ranked, min(count, int(apart.sum())))
        rest = best(draw.masked_fill(apart, -torch.inf), count - len(first))
        return selection(torch.cat([first, rest]), signals.length)
