"""Greedy selections before the language model: farthest points, coverage, determinantal, de-duplication.

All are batched over pictures, work in float32, are deterministic (ties go to the lower position) and never choose a
token twice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1024
"""Rows of a similarity matrix at a time, where the whole one would not fit."""
LARGEST = 8192
"""Tokens up to which a picture's similarity matrix is held; beyond, rows are computed when they are needed."""


def unit(x: Tensor) -> Tensor:
    """Rows of length one in float32; a zero row stays zero."""
    return F.normalize(x.float(), dim=-1, eps=1e-12)


def farthest_points(x: Tensor, count: int) -> Tensor:
    """Max-min diversity (DivPrune, arXiv 2503.02175): each token is the farthest from those chosen before it.

    Distance is 1 - cosine. The first token is the one whose nearest neighbour is farthest away. A running minimum
    makes it O(KN) after the nearest neighbours are known; the official code gathers all chosen rows in every step
    and may choose the same token twice when there are exact duplicates.

    Args:
        x: Features, (B, N, D).
        count: Tokens to choose, K <= N.

    Returns:
        Indices in the order they were chosen, (B, K).
    """
    x = unit(x)
    batch, n, _ = x.shape
    row = torch.arange(batch, device=x.device)
    similarity = x @ x.transpose(1, 2) if n <= LARGEST else None
    nearest = torch.cat([_second(part, x, similarity) for part in torch.arange(n, device=x.device).split(BLOCK)], dim=1)
    chosen = nearest.argmax(1)
    order = [chosen]
    distance = torch.full_like(nearest, torch.inf)
    for _ in range(count - 1):
        to_chosen = similarity[row, chosen] if similarity is not None else (x @ x[row, chosen].unsqueeze(-1))[..., 0]
        torch.minimum(distance, 1 - to_chosen, out=distance)
        distance[row, chosen] = -torch.inf
        chosen = distance.argmax(1)
        order.append(chosen)
    return torch.stack(order, dim=1)


def _second(part: Tensor, x: Tensor, similarity: Tensor | None) -> Tensor:
    """Second smallest distance of the tokens `part` to all (the smallest is that to themselves), (B, P)."""
    if x.shape[1] == 1:
        return x.new_zeros(len(x), len(part))
    rows = x[:, part] @ x.transpose(1, 2) if similarity is None else similarity[:, part]
    return 1 - rows.topk(2, dim=-1).values[..., 1]


def greatest_coverage(x: Tensor, saliency: Tensor, count: int, alpha: float = 1.0) -> Tensor:
    """Facility location times saliency (SCOPE, arXiv 2510.24214).

    The gain of a token is how much closer, summed over all tokens, it brings the nearest chosen one (cosine, never
    below zero), times its saliency to the power alpha.

    Args:
        x: Features, (B, N, D).
        saliency: Weight of every token, at least 0, (B, N).
        count: Tokens to choose, K <= N.
        alpha: 0 ignores the saliency.

    Returns:
        Indices in the order they were chosen, (B, K).
    """
    x = unit(x)
    similarity = x @ x.transpose(1, 2)
    weight = saliency.float().clamp_min(0) ** alpha
    covered = torch.zeros_like(weight)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    row = torch.arange(len(x), device=x.device)
    room = torch.empty_like(similarity)
    order = []
    for _ in range(count):
        torch.sub(similarity, covered.unsqueeze(1), out=room)
        gain = room.clamp_(min=0).sum(-1) * weight
        chosen = gain.masked_fill(taken, -1).argmax(1)
        order.append(chosen)
        taken[row, chosen] = True
        covered = torch.maximum(covered, similarity[row, chosen])
    return torch.stack(order, dim=1)


def determinantal(x: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Greedy mode of a conditional determinantal point process (CDPruner, arXiv 2506.10967): O(K^2 N).

    The kernel is diag(r) S diag(r), S the cosines. Where the tokens left depend on those chosen (the remaining
    volume is zero up to rounding) the official code divides by zero; here they follow by position.

    Args:
        x: Features, (B, N, D).
        relevance: r, (B, N).
        count: Tokens to choose, K <= N.

    Returns:
        Indices in the order they were chosen, (B, K).
    """
    x = unit(x)
    batch, n, _ = x.shape
    weight = relevance.float()
    kernel = weight.unsqueeze(2) * (x @ x.transpose(1, 2)) * weight.unsqueeze(1)
    volume = kernel.diagonal(dim1=1, dim2=2).clone()
    floor = 1e-6 * volume.amax(1)
    rows = kernel.new_zeros(batch, count, n)
    row = torch.arange(batch, device=x.device)
    order = []
    for step in range(count):
        chosen = volume.argmax(1)
        order.append(chosen)
        left = volume[row, chosen]
        before = rows[:, :step]
        known = (before[row, :, chosen].unsqueeze(1) @ before)[:, 0] if step else torch.zeros_like(volume)
        new = (kernel[row, chosen] - known) / left.clamp_min(1e-20).sqrt().unsqueeze(1)
        new = torch.where((left > floor).unsqueeze(1), new, torch.zeros_like(new))
        rows[:, step] = new
        volume = torch.where(volume == -torch.inf, volume, (volume - new**2).clamp_min(0))
        volume[row, chosen] = -torch.inf
    return torch.stack(order, dim=1)


def drop_duplicates(x: Tensor, order: Tensor, count: int, step: int = 8) -> Tensor:
    """Iterative removal of near duplicates (VisPruner, arXiv 2412.01818).

    The list is split into even and odd places; those even ones that are most similar to an odd one go, `step` a round;
    the even ones that stay, most similar first, and the odd ones form the next list. The official code fails on
    lists of odd length; here the even half is then one longer.

    Args:
        x: Features, (B, N, D).
        order: The list at the start, indices (B, R).
        count: Tokens to keep, K <= R.
        step: Tokens removed in a round.

    Returns:
        Indices that stay, (B, K).
    """
    x = unit(x)
    similarity = x @ x.transpose(1, 2)
    if count == 0:
        return order[:, :0]
    while order.shape[1] > count:
        even, odd = order[:, ::2], order[:, 1::2]
        gone = min(step, order.shape[1] - count, even.shape[1])
        rows = similarity.gather(1, even.unsqueeze(2).expand(-1, -1, similarity.shape[2]))
        score = rows.gather(2, odd.unsqueeze(1).expand(-1, even.shape[1], -1)).amax(-1)
        left = even.gather(1, score.sort(dim=1, descending=True, stable=True).indices[:, gone:])
        order = torch.cat([left, odd], dim=1)
    return order
