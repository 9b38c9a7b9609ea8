"""VQToken: a clip as the means of a few clusters of its tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.greedy import unit
from vistok.compress.hash_attention import CodebookAttention, VQAttention, load_codebook_attention, load_vq_attention
from vistok.compress.kmeans import (
    Clusters,
    Rule,
    choose_clusters,
    cluster_tokens,
    plus_plus,
    seeds,
    silhouette,
    sweep,
)
from vistok.compress.method import FeatureMethod
from vistok.compress.reduction import Reduction
from vistok.compress.signals import Signals
from vistok.registry import register

SMALLEST = 12
"""Clusters with which the adaptive rules begin."""


@register("method", "vqtoken")
class VQToken(FeatureMethod):
    """Clusters of the projected tokens by direction, one token for each (arXiv 2503.16980, NeurIPS 2025).

    The Reduction's labels, laid out like the clip, are the paper's token hash map. Tokens take the place of their
    first member and the mean length of all members; empty clusters give none. Seeded: the same for every batch.

    Args:
        keep: Clusters: an int per clip or picture (32 is the paper's fixed length), a float share, a `Budget`; None
            lets `adaptive` choose between 12 and `max_clusters`.
        adaptive: Rule that chooses, see `kmeans.choose_clusters`.
        max_clusters: The most that the rule may choose.
        seed: Of the first centroids (k-means++).
        weights: Safetensors file of a VQ-attention that follows the clustering: under `reference` that of the published
            checkpoint, else a `hash_attention.CodebookAttention`, the paper's form. Without, cluster means go to the
            language model as they are, as in the released configuration.
        heads: Attention heads of that module.
        reference: As released: clips alone, means of tokens of unit length (so their lengths are lost), zero rows for
            empty clusters, the order of the clusters, the elbow with its offset, positions counted anew.
    """

    merges = True
    door: ClassVar[dict[str, Any] | None] = None

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = 32,
        adaptive: Rule = "elbow",
        max_clusters: int = 32,
        seed: int = 0,
        weights: str | None = None,
        heads: int = 8,
        reference: bool = False,
    ) -> None:
        super().__init__(keep=keep, reference=reference)
        if max_clusters < 1:
            raise ValueError(f"max_clusters={max_clusters}: at least 1.")
        self.adaptive: Rule = "elbow_reference" if reference and adaptive == "elbow" else adaptive
        self.max_clusters, self.seed, self.weights, self.heads = max_clusters, seed, weights, heads
        self._attention = None if weights is None else _load(weights, heads, released=reference)

    @property
    def modalities(self) -> frozenset[str]:  # type: ignore[override]
        """Clips, and pictures too unless as released."""
        return frozenset({"video"}) if self.reference else frozenset({"image", "video"})

    @property
    def in_order(self) -> bool:
        """Released: the order of the clusters."""
        return not self.reference

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """One token per cluster."""
        x = unit(signals.features).unsqueeze(0)
        found = self._clusters(x, count)
        labels, counts = found.labels[0], found.counts[0]
        place = torch.arange(signals.length, device=x.device)
        first = torch.full_like(counts, signals.length).scatter_reduce(0, labels, place, "amin")
        if not self.reference:  # no empty clusters, numbered as they appear
            order = first.argsort()[: int((counts > 0).sum())]
            labels = torch.empty_like(counts).scatter(0, order, torch.arange(len(order), device=x.device))[labels]
            first, counts = first[order], counts[order]
        length = signals.features.float().norm(dim=-1).clamp_min(1e-12)
        weights = 1 / (length * counts[labels])
        if not self.reference:
            total = torch.zeros(len(counts), device=x.device).index_add(0, labels, length)
            weights = weights * (total / counts)[labels]
        index = first.clamp_max(signals.length - 1)
        return Reduction(index[None], counts[None], signals.length, labels.view(1, -1, 1), weights.view(1, -1, 1))

    def _clusters(self, x: Tensor, count: int | None) -> Clusters:
        def init(clusters: int) -> Tensor:
            return plus_plus(x, clusters, seeds(1, clusters, self.seed, x.device))

        if count is not None:
            return cluster_tokens(x, init(count))
        n = x.shape[1]
        tried = range(min(SMALLEST, n), min(max(self.max_clusters, SMALLEST), n) + 1)
        runs = sweep(x, init, tried)
        if self.adaptive == "silhouette":
            return max(runs, key=lambda run: float(silhouette(x, run[0])))[0]
        if len(runs) < 3:
            return runs[-1][0]
        chosen = choose_clusters(torch.cat([value for _, value in runs]).double(), tried[0], self.adaptive)
        return runs[min(max(chosen, tried[0]), tried[-1]) - tried[0]][0]

    def mix(self, tokens: Tensor, reduction: Reduction, signals: Signals) -> Tensor:
        """The VQ-attention, if its weights were given: max(frames, clusters) rows as released, else one a cluster."""
        if self._attention is None:
            return tokens
        grid = self.grid_of(signals.grid, signals.length)
        hash_map = reduction.labels().view(1, *([1] if len(grid) == 2 else []), *grid)
        module = self._attention.to(tokens.device, tokens.dtype)
        width = module.width
        if width != tokens.shape[1]:
            raise ValueError(
                f"This VQ-attention is {width} wide and the host's features {tokens.shape[1]}. Leave out weights, or "
                "use the host they were trained with."
            )
        if isinstance(module, VQAttention):
            hash_map = hash_map.flatten(2)
            cells = module.to_q_proj.in_features
            if hash_map.shape[2] != cells:
                raise ValueError(
                    f"This VQ-attention reads frames of {cells} tokens, and the host gives {hash_map.shape[2]}. Leave "
                    "out weights, or use the host they were trained with."
                )
        mixed: Tensor = module(hash_map, tokens.unsqueeze(0))[0]
        return mixed


def _load(path: str, heads: int, *, released: bool) -> VQAttention | CodebookAttention:
    from safetensors.torch import load_file

    state = load_file(path)
    return load_vq_attention(state, heads) if released else load_codebook_attention(state, heads)
