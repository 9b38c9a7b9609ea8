"""Selections: which tokens of every image stay. Batched, deterministic, ties go to the lower position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIX = (0x7FEB352D, 0x846CA68B)  # multipliers of a 32-bit avalanche hash ("lowbias32")


def hash_scores(place: Tensor, seed: int) -> Tensor:
    """A pseudo-random score per position, the same in every batch and on every device, float64 in [0, 1).

    Args:
        place: Positions (of tokens inside their image), int64.
        seed: Chooses the ranking.
    """
    x = (place.long() + ((seed + 1) * 0x9E3779B9 & 0xFFFFFFFF)) & 0xFFFFFFFF
    for multiplier, shift in zip(MIX, (16, 15)):
        x = x ^ (x >> shift)
        x = (x * (multiplier & 0xFFFF) + (((x * (multiplier >> 16)) & 0xFFFF) << 16)) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return x.double() / 2**32


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores along the last axis, best first; ties go to the lower position."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def rank_in_segments(scores: Tensor, segment: Tensor) -> Tensor:
    """Rank of every token inside its segment, best first, (B, N) int64; tokens of no segment (-1) rank together.

    Args:
        scores: Larger is better, (B, N). Compared in the type given: pass float32 or float64.
        segment: Number of the segment (image) of every token, -1 for none, (B, N).
    """
    by_score = torch.sort(scores, dim=1, descending=True, stable=True).indices
    by_segment = torch.sort(segment.gather(1, by_score), dim=1, stable=True)
    order = by_score.gather(1, by_segment.indices)  # grouped by segment, best first
    n = segment.shape[1]
    place = torch.arange(n, device=segment.device).expand_as(segment)
    sorted_segment = by_segment.values
    starts = torch.ones_like(sorted_segment, dtype=torch.bool)
    starts[:, 1:] = sorted_segment[:, 1:] != sorted_segment[:, :-1]
    start = torch.where(starts, place, torch.zeros_like(place)).cummax(dim=1).values
    return torch.empty_like(order).scatter_(1, order, place - start)


def top_in_segments(scores: Tensor, segment: Tensor, quotas: Sequence[Sequence[int]]) -> Tensor:
    """Mask of the best tokens of every segment, (B, N); False outside segments.

    Args:
        scores: Larger is better, (B, N).
        segment: Segment of every token, -1 for none, (B, N).
        quotas: How many tokens each segment of each row keeps.
    """
    width = max((len(row) for row in quotas), default=0)
    if width == 0:
        return torch.zeros_like(segment, dtype=torch.bool)
    table = torch.tensor([[*row, *[0] * (width - len(row))] for row in quotas], device=segment.device)
    quota = table.gather(1, segment.clamp_min(0))
    return (segment >= 0) & (rank_in_segments(scores, segment) < quota)


def segment_sum(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sum of every segment, handed back to its tokens, (B, N); 0 outside segments.

    Args:
        values: (B, N).
        segment: Segment of every token, -1 for none, (B, N).
        segments: Number of segments.
    """
    slot = segment.clamp_min(0)
    inside = values * (segment >= 0)
    totals = values.new_zeros(values.shape[0], max(segments, 1)).scatter_add(1, slot, inside)
    return totals.gather(1, slot) * (segment >= 0)


def segment_mean(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Mean of every segment, handed back to its tokens, (B, N)."""
    count = segment_sum(torch.ones_like(values), segment, segments).clamp_min(1)
    return segment_sum(values, segment, segments) / count
