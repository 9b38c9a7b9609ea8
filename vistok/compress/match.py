"""Bipartite soft matching: which tokens go into which, exclusive pairs, one cosine table."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.reduction import Reduction


def bipartite(
    metric: Tensor,
    merged: int,
    *,
    prefix: int = 0,
    sizes: Tensor | None = None,
    penalty: Tensor | None = None,
    ordered: bool = True,
) -> Reduction:
    """Merge the `merged` most similar tokens at even positions into tokens at odd positions (ToMe, section 3).

    Every even token looks for its most similar odd one (cosine, first on ties); the best pairs are merged to the mean
    weighted by sizes. Prefix tokens are neither sources nor destinations. Released ToMe knows a class and a
    distillation token; for those two this is the same map, for more (registers) the rule goes on.

    Args:
        metric: What is compared, (B, N, D).
        merged: Pairs, capped at half of the tokens that may move.
        prefix: Leading tokens that stay as they are.
        sizes: Patches that every token stands for, float32, (B, N); ones by default.
        penalty: Subtracted from the best similarity of each token before the pairs are ranked, (B, N): it says which
            tokens go first and never where to. Only even positions count.
        ordered: The remaining even tokens keep their order. Released ToMe leaves them by falling similarity where
            there is no class token, which loses their place.

    Returns:
        To (B, N - merged) tokens: prefix, remaining even tokens, odd tokens. The anchor of a pair is its odd token.
    """
    batch, n, _ = metric.shape
    device = metric.device
    merged = max(0, min(merged, (n - prefix) // 2))
    unit = F.normalize(metric.float(), dim=-1, eps=1e-12)
    even = (n + 1) // 2
    fixed_even, fixed_odd = (prefix + 1) // 2, prefix // 2
    table = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, even, odd)
    best, partner = table[:, fixed_even:, fixed_odd:].max(-1)
    if penalty is not None:
        best = best - penalty[:, ::2][:, fixed_even:]
    rank = best.sort(dim=1, descending=True, stable=True).indices
    gone, rest = rank[:, :merged], rank[:, merged:]
    if ordered:
        rest = rest.sort(dim=1).values
    place = torch.arange(n, device=device)
    lead = place[:prefix].expand(batch, -1)
    stays = 2 * (rest + fixed_even)
    tail = place[1::2][fixed_odd:].expand(batch, -1)
    index = torch.cat([lead, stays, tail], dim=1)
    first_odd = prefix + even - fixed_even - merged
    target = first_odd + partner.gather(1, gone)
    sources = 2 * (gone + fixed_even)
    return pairs(index, sources, target, n, sizes)


def pairs(index: Tensor, sources: Tensor, target: Tensor, length: int, sizes: Tensor | None = None) -> Reduction:
    """The reduction to the tokens at `index` after each of `sources` went into output `target`.

    Args:
        index: Inputs that stay, (B, M).
        sources: Inputs that go, (B, r), with M + r = N.
        target: Output that each goes to, (B, r).
        length: Number of inputs, N.
        sizes: Weights of the mean, float32, (B, N); ones by default.
    """
    batch, slots = index.shape
    device = index.device
    mass = torch.ones(batch, length, device=device) if sizes is None else sizes.float()
    total = mass.gather(1, index).scatter_add(1, target, mass.gather(1, sources))
    links = torch.empty(batch, length, dtype=torch.int64, device=device)
    links = links.scatter(1, index, torch.arange(slots, device=device).expand(batch, -1)).scatter(1, sources, target)
    weights = mass / total.gather(1, links)
    return Reduction(index, total, length, links.unsqueeze(-1), weights.unsqueeze(-1), moved=sources, drops=False)


def runs(metric: Tensor, length: int, sizes: Tensor | None = None) -> Reduction:
    """In every run of `length` tokens the earlier ones go into the last (`kth_bipartite_soft_matching` of ToMe's code).

    That code looks for the most similar destination among all last tokens; tokens that fill no run are dropped.

    Args:
        metric: What is compared, (B, N, D).
        length: Tokens of a run, at least 2.
        sizes: Weights, float32, (B, N).
    """
    batch, n, _ = metric.shape
    used = n // length * length
    unit = F.normalize(metric.float(), dim=-1, eps=1e-12)
    place = torch.arange(n, device=metric.device)
    last = place[:used][length - 1 :: length]
    early = place[:used].view(-1, length)[:, :-1].flatten()
    target = (unit[:, early] @ unit[:, last].transpose(1, 2)).argmax(-1)
    found = pairs(
        last.expand(batch, -1), early.expand(batch, -1), target, used, None if sizes is None else sizes[:, :used]
    )
    assert found.links is not None and found.weights is not None
    links = F.pad(found.links, (0, 0, 0, n - used), value=-1)
    weights = F.pad(found.weights, (0, 0, 0, n - used))
    return Reduction(found.index, found.sizes, n, links, weights)


def fold(features: Tensor, merged: int, *, prefix: int = 0, sizes: Tensor | None = None) -> Reduction:
    """Merge many tokens at once: pairs again and again until `merged` have gone, then back in order of position.

    The late fold of FOLDER (arXiv 2501.02430, `merge_features` of its code), with the tokens themselves as the metric.
    That code multiplies its result by 1 + log(size), always when it folds more than once and otherwise only while
    fewer than half as many tokens go as stay: multiply yourself, `found.apply(x) * (1 + found.sizes.log())[..., None]`.

    Args:
        features: Tokens, (B, N, D).
        merged: How many go; at least one token behind the prefix stays.
        prefix: Leading tokens that stay as they are.
        sizes: Weights, float32, (B, N).
    """
    batch, n, _ = features.shape
    place = torch.arange(n, device=features.device).expand(batch, -1)
    mass = torch.ones(batch, n, device=features.device) if sizes is None else sizes.float()
    total: Reduction | None = None
    left, x = min(merged, n - prefix - 1), features
    while left > 0:
        step = bipartite(x, left, prefix=prefix, sizes=mass)
        left -= x.shape[1] - step.index.shape[1]
        x, mass = step.apply(x), step.sizes
        total = step if total is None else replace(total.compose(step), sizes=mass)
    if total is None:
        return Reduction(place, mass, n, place.unsqueeze(-1), torch.ones(batch, n, 1, device=x.device), drops=False)
    order = total.index.argsort(dim=1)
    by_place = Reduction(order, mass.gather(1, order), order.shape[1])
    return replace(total.compose(by_place), sizes=by_place.sizes, drops=False)
