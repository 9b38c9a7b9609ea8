"""MustDrop (arXiv 2411.10803): merge in the tower, filter by two thresholds at prefill, thin out the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.compress.budget import Budget, HostShape
from vistok.compress.merge import merge_windows, window_similarity, windows
from vistok.compress.method import Decision, ScheduledMethod, Stage
from vistok.compress.reduction import Reduction, behind_prefix, pack
from vistok.compress.select import segment_sum
from vistok.compress.view import View
from vistok.compress.vision import BlockView, VisionMethod
from vistok.registry import preset, register


@register("method", "mustdrop")
class MustDrop(ScheduledMethod, VisionMethod):
    """Three stages under one key set of tokens that never go.

    *Tower*: after its first block, 3x3 windows of mean cosine >= 0.8 become their mean; the 8 % of tokens that the
    class token attends to most in the last block are the key set (in towers without one, the tokens that receive most
    attention). Where a host joins patches before its language model (2x2 in Qwen, pixel shuffle), windows are of such
    groups. *Prefill*: after layers 2, 6, 10, 14 of 32 a token goes if its share of the text's attention is below
    `gamma_global` and no text token gives it `gamma_individual`.
    *Cache*: layers 2..14 keep only what survived to the end. Default thresholds are those of "192 tokens" on LLaVA-1.5;
    they are absolute probabilities, so they do not carry over to prompts of other lengths.

    With `keep` both thresholds are multiplied by one factor, found exactly from the same attention rows, so that the
    number of tokens is met; cuts before the last aim at a geometric way there.

    Args:
        keep: Image tokens left after the last cut: an int per image, a float share (of what the tower gives), or a
            `Budget`; by default whatever the thresholds leave.
        layers: Layers in front of which the cuts fall (released: 3, 7, 11, 15).
        gamma_global: Threshold of the share of the summed attention.
        gamma_individual: Threshold of the largest attention.
        merge: Work in the tower too: merging and key set.
        window: Side of a merging window.
        similarity: Threshold of merging.
        keys: Share of the tokens in the key set.
        evict: Thin out the cache.
        reference: As released: positions renumbered, every picture of a batch merges as many windows as the most
            detailed one, means in front, one filter over all images of a sample.
    """

    stages = frozenset({"vision", "prefill", "decode"})
    published_layers = (3, 7, 11, 15)
    published_ratios = (1.0, 1.0, 1.0, 1.0)
    merges = True
    after = True
    proportional = False
    needs = frozenset({"cls_row", "text"})

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        layers: Sequence[int] | None = None,
        gamma_global: float = 0.001,
        gamma_individual: float = 0.001,
        merge: bool = True,
        window: int = 3,
        similarity: float = 0.8,
        keys: float = 0.08,
        evict: bool = True,
        reference: bool = False,
    ) -> None:
        cuts = len(self.published_layers if layers is None else layers)
        super().__init__(keep=keep, layers=layers, ratios=(1.0,) * cuts, reference=reference)
        self.gamma_global, self.gamma_individual = gamma_global, gamma_individual
        self.merge, self.window_side, self.similarity, self.keys = merge, window, similarity, keys
        self.thins = evict
        if keep == 1.0 and isinstance(keep, float):  # no cut and no merge
            self.merge = self.thins = False
        used: dict[Stage, bool] = {"vision": self.merge, "prefill": True, "decode": self.thins}
        self.stages = frozenset(stage for stage, on in used.items() if on)  # type: ignore[misc]

    @property
    def renumber(self) -> bool:
        """The released code renumbers."""
        return self.reference

    def source_of(self, layer: int) -> int:
        """The layer before the cut."""
        return layer - 1

    def rows(self, view: View) -> Tensor:
        """The text after the last image."""
        return view.text_after_images()

    def schedule(self, n: int, share: float | None) -> list[int]:
        """Geometric way to a share."""
        cuts = len(self.ratios)
        share = 1.0 if share is None else share
        return [max(1, round(n * share ** ((i + 1) / cuts))) for i in range(cuts)]

    def reduce(self, view: View, host: HostShape) -> Decision:
        """Drop what both thresholds allow to drop, or rank by the factor at which that happens."""
        scores = self.scores(view)
        if self.keep is not None:
            return super().reduce(view, host)
        reduction, counts = view.keep_mask(scores >= 1)
        return Decision(reduction=reduction, counts=counts)

    def scores(self, view: View) -> Tensor:
        """Factor on both thresholds at which a token goes, (B, L): below 1 it goes at the thresholds as given."""
        assert view.attention is not None and view.row_valid is not None
        attention = view.attention.mean(1) * view.row_valid.unsqueeze(-1)  # (B, R, L)
        summed = attention.sum(1)
        share = summed / segment_sum(summed, view.segment, view.images).clamp_min(1e-20)
        return torch.maximum(share / self.gamma_global, attention.amax(1) / self.gamma_individual)

    def evicted_layers(self, depth: int) -> range:
        """From the layer before the first cut to the one before the last."""
        if not self.thins:
            return range(0)
        layers = self.cut_layers(depth)
        return range(max(1, layers[0] - 1), layers[-1])

    def evict(self, view: View, received: Tensor | None, host: HostShape) -> Decision:
        """Keep what survived to the last layer."""
        assert view.survivors is not None and view.survivor_counts is not None
        if view.survivor_counts == view.counts:
            return Decision(reduction=None, counts=view.counts)
        longest = max(text + sum(row) for text, row in zip(view.texts, view.survivor_counts))
        return Decision(reduction=pack(view.survivors, longest), counts=view.survivor_counts)

    def active(self, layer: int, depth: int, start: int) -> bool:
        """Merging is after the first block."""
        return self.merge and layer == 0

    def watches(self, layer: int, depth: int, start: int) -> bool:
        """The key set is found in the last block."""
        return self.merge and layer == depth - 1

    def in_block(self, view: BlockView) -> Reduction | None:
        """Merge after the first block, note the class token's attention in the last."""
        found = self._merged(view) if view.layer == 0 else None
        if view.layer == view.depth - 1:
            view.memory["class_row"] = view.salience()[:, view.prefix :]
            view.memory["real"] = view.sizes[:, view.prefix :] > 0
        return found

    def _merged(self, view: BlockView) -> Reduction | None:
        """Merging of windows; None if none is alike. Under `reference` all samples merge as many as the least alike."""
        if view.grid is None:
            return None
        x, places = view.tokens, view.place[0].argsort()  # windows are cut on the raster
        members = windows((view.grid[-2], view.grid[-1]), self.window_side, x.device)
        if not len(members):
            return None
        members = places[members]
        alike = window_similarity(x, members)
        merged = (alike >= self.similarity).sum(1)
        least, most = int(merged.min()), int(merged.max())
        if most == 0 or (self.reference and least == 0):
            return None
        number = least if self.reference or least == most else merged
        return behind_prefix(
            merge_windows(alike, members, x.shape[1], number, raster=not self.reference), view.prefix, view.sizes
        )

    def must_stay(self, memory: Mapping[str, Any]) -> Tensor | None:
        """The key set."""
        return self.key_set(memory["class_row"], memory["real"]) if "class_row" in memory else None

    def key_set(self, class_row: Tensor, real: Tensor | None = None) -> Tensor:
        """Tokens that must stay, by the attention of the class token, (B, N) -> mask (B, N).

        Args:
            class_row: Attention, (B, N).
            real: True at tokens, False at fillers, (B, N).
        """
        real = torch.ones_like(class_row, dtype=torch.bool) if real is None else real
        count = torch.ceil(real.sum(1, keepdim=True).double() * self.keys)
        best = class_row.masked_fill(~real, -1).sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(best).scatter(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
        return (rank < count) & real


preset("method", "mustdrop_192", builder="mustdrop", config={"gamma_global": 0.001, "gamma_individual": 0.001})
preset("method", "mustdrop_128", builder="mustdrop", config={"gamma_global": 0.0012, "gamma_individual": 0.001})
preset("method", "mustdrop_64", builder="mustdrop", config={"gamma_global": 0.011, "gamma_individual": 0.01})
