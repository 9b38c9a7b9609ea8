"""Clustering of tokens by direction, batched over clips, seedable, as VQToken (arXiv 2503.16980) does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.select import hash_scores

Rule = Literal["elbow_reference", "elbow", "silhouette", "threshold"]


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Result of a clustering of N tokens into K clusters.

    Attributes:
        labels: Cluster of every token, (B, N); laid out as the clip this is the paper's token hash map.
        centroids: What the labels were computed with, (B, K, D).
        counts: Tokens of every cluster, (B, K).
    """

    labels: Tensor
    centroids: Tensor
    counts: Tensor


def cluster_means(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean of every cluster, zero where it is empty, (B, K, D), and its tokens, (B, K); differentiable in x."""
    batch, _, width = x.shape
    total = x.new_zeros(batch, clusters, width).scatter_add(1, labels.unsqueeze(-1).expand_as(x), x)
    counts = torch.zeros(batch, clusters, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(1, labels, torch.ones_like(labels))
    return total / counts.clamp_min(1).unsqueeze(-1).to(x.dtype), counts


def cluster_tokens(x: Tensor, init: Tensor, *, iterations: int = 50, tolerance: float = 1e-4) -> Clusters:
    """K-means by cosine: labels from directions, centroids plain means (not made unit again).

    An empty cluster keeps its centroid. A clip is done when its centroids move less than the tolerance (Frobenius
    norm), and its labels are those of the centroids before that move, as in the released code; clips of a batch stop
    one by one. No Python loop over clips or clusters.

    Args:
        x: Tokens of unit length, (B, N, D).
        init: Tokens that are the first centroids, (B, K).
        iterations: At most so many.
        tolerance: See above.
    """
    batch, _, width = x.shape
    clusters = init.shape[1]
    centroids = x.gather(1, init.unsqueeze(-1).expand(-1, -1, width))
    labels = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    counts = torch.zeros(batch, clusters, dtype=torch.int64, device=x.device)
    used = centroids
    done = torch.zeros(batch, dtype=torch.bool, device=x.device)
    direction = F.normalize(x, dim=-1, eps=1e-12)
    for _ in range(iterations):
        found = (direction @ F.normalize(centroids, dim=-1, eps=1e-12).transpose(1, 2)).argmax(-1)
        means, sizes = cluster_means(x, found, clusters)
        moved = torch.where((sizes > 0).unsqueeze(-1), means, centroids)
        open_ = ~done
        labels = torch.where(open_.unsqueeze(1), found, labels)
        counts = torch.where(open_.unsqueeze(1), sizes, counts)
        used = torch.where(open_.view(-1, 1, 1), centroids, used)
        done = done | ((moved - centroids).flatten(1).norm(dim=1) < tolerance)
        if bool(done.all()):
            break
        centroids = torch.where(done.view(-1, 1, 1), centroids, moved)
    else:  # stopped by the count: the released code returns the last centroids
        used = torch.where(done.view(-1, 1, 1), used, centroids)
    return Clusters(labels=labels, centroids=used, counts=counts)


def plus_plus(x: Tensor, clusters: int, uniform: Tensor) -> Tensor:
    """k-means++ with given random numbers.

    The first token is number int(u0 * N); each further one is drawn with weight (distance to the nearest chosen)^2 +
    1e-6 by inverting the cumulative distribution in float64.

    Args:
        x: Tokens of unit length, (B, N, D).
        clusters: K.
        uniform: Numbers in [0, 1), (B, K).

    Returns:
        Indices, (B, K).
    """
    batch, n, width = x.shape
    uniform = uniform.double()
    chosen = (uniform[:, 0] * n).long().clamp_max(n - 1)
    order = [chosen]
    nearest = torch.full((batch, n), torch.inf, device=x.device)
    for k in range(1, clusters):
        latest = x.gather(1, chosen.view(-1, 1, 1).expand(-1, 1, width))
        nearest = torch.minimum(nearest, (x - latest).norm(dim=-1) ** 2)
        weight = (nearest + 1e-6).double()
        edges = (weight / weight.sum(1, keepdim=True)).cumsum(1)
        chosen = torch.searchsorted(edges, uniform[:, k : k + 1].contiguous(), right=True)[:, 0].clamp_max(n - 1)
        order.append(chosen)
    return torch.stack(order, dim=1)


def seeds(batch: int, count: int, seed: int, device: torch.device | None = None) -> Tensor:
    """The same `count` uniform numbers for every clip, so that a batch equals its clips one by one, (B, count)."""
    return hash_scores(torch.arange(count, device=device), seed).expand(batch, -1)


def distortion(x: Tensor, found: Clusters) -> Tensor:
    """Sum of squared Euclidean distances to the centroids, (B,)."""
    own = found.centroids.gather(1, found.labels.unsqueeze(-1).expand_as(x))
    return ((x - own) ** 2).sum((1, 2))


def choose_clusters(curve: Tensor, smallest: int, rule: Rule, gain: float = 0.02) -> int:
    """Number of clusters by a rule on the distortions for K = smallest, smallest + 1, ...

    Args:
        curve: Distortions, (R,).
        smallest: First K.
        rule: `elbow` takes the K where the curve bends most (the middle of the largest second difference);
            `elbow_reference` is that of the released code, which adds 4 to the number of the bend and never goes
            below 12, so it mostly says 12; `threshold` the smallest K after which one more cluster lowers the
            distortion by less than a share `gain`; `silhouette` is not a rule on this curve, see `silhouette`.
        gain: For `threshold`.

    Raises:
        ValueError: Fewer than three points for an elbow, or a rule that needs more than the curve.
    """
    if rule == "silhouette":
        raise ValueError("The silhouette needs tokens and labels, not a curve: use vqtoken with adaptive='silhouette'.")
    if rule == "threshold":
        relative = (curve[:-1] - curve[1:]) / curve[:-1].clamp_min(1e-12)
        below = (relative < gain).nonzero()
        return smallest + (int(below[0]) if len(below) else len(curve) - 1)
    if len(curve) < 3:
        raise ValueError(f"An elbow needs at least three numbers of clusters, got {len(curve)}. Raise max_clusters.")
    bend = int(torch.diff(curve, n=2).argmax())
    return max(bend + 4, 12) if rule == "elbow_reference" else smallest + bend + 1


def silhouette(x: Tensor, found: Clusters) -> Tensor:
    """Simplified silhouette by cosine distance to centroids, mean over tokens, (B,); larger is better."""
    away = 1 - F.normalize(x, dim=-1, eps=1e-12) @ F.normalize(found.centroids, dim=-1, eps=1e-12).transpose(1, 2)
    away = away.masked_fill((found.counts == 0).unsqueeze(1), torch.inf)
    own = away.gather(2, found.labels.unsqueeze(-1))
    other = away.scatter(2, found.labels.unsqueeze(-1), torch.inf).amin(-1)
    own = own[..., 0]
    score = torch.where(other.isinf(), 0.0, (other - own) / torch.maximum(own, other).clamp_min(1e-12))
    return score.mean(1)


def sweep(
    x: Tensor, init: Callable[[int], Tensor], counts: range, *, iterations: int = 100
) -> list[tuple[Clusters, Tensor]]:
    """Clusterings for a range of K with their distortions."""
    found = [cluster_tokens(x, init(k), iterations=iterations) for k in counts]
    return [(c, distortion(x, c)) for c in found]
