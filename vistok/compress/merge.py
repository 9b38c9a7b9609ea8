"""Merging neighbouring tokens of a grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.reduction import Reduction


def windows(grid: tuple[int, int], size: int, device: torch.device | None = None) -> Tensor:
    """Members of every full window of size x size, windows in raster order, (W, size * size).

    Border cells that fill no window belong to none.
    """
    h, w = grid
    place = torch.arange(h * w, device=device).view(h, w)[: h - h % size, : w - w % size]
    cut = place.unfold(0, size, size).unfold(1, size, size)  # (h / size, w / size, size, size)
    return cut.reshape(-1, size * size)


def window_similarity(x: Tensor, members: Tensor) -> Tensor:
    """Mean cosine between different members of every window, x (B, N, D), members (W, k) -> float32 (B, W)."""
    k = members.shape[1]
    unit = F.normalize(x.float(), dim=-1, eps=1e-8)[:, members]  # (B, W, k, D)
    total: Tensor = (unit @ unit.transpose(2, 3)).sum((2, 3))
    return (total - k) / (k * (k - 1))


def merge_windows(similarity: Tensor, members: Tensor, length: int, merged: int | Tensor, *, raster: bool) -> Reduction:
    """Turn the most similar windows of every sample into the plain mean of their members.

    Args:
        similarity: Of every window, (B, W).
        members: Tokens of every window, (W, k).
        length: Number of tokens, N.
        merged: How many windows to merge: a number, or one per sample, (B,); samples that merge more end in fillers
            (one host synchronisation).
        raster: Put every mean at the middle of its window, in raster order; otherwise means come first, the most
            similar window leading, as MustDrop's code has it.
    """
    batch, k = len(similarity), members.shape[1]
    device = similarity.device
    fewest = merged if isinstance(merged, int) else int(merged.min())
    count = torch.as_tensor(merged, device=device).expand(batch).unsqueeze(1)
    order = similarity.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=device).expand(batch, -1))
    chosen = rank < count  # (B, W)
    middle = members[:, k // 2 if raster else k - 1]
    place = torch.arange(length, device=device).expand(batch, -1)
    inside = members.flatten().expand(batch, -1)
    gone = torch.zeros(batch, length, dtype=torch.bool, device=device)
    gone = gone.scatter(1, inside, chosen.repeat_interleave(k, dim=1))
    key = place.double().masked_fill(gone, torch.inf)  # position in the output: untouched tokens by raster
    lead = middle.expand(batch, -1).double() if raster else rank.double() - order.shape[1]
    anchors = middle.expand(batch, -1)
    key = key.scatter(1, anchors, torch.where(chosen, lead, key.gather(1, anchors)))
    index = key.sort(dim=1, stable=True).indices[:, : length - fewest * (k - 1)]
    slot = torch.zeros_like(place).scatter(1, index, torch.arange(index.shape[1], device=device).expand(batch, -1))
    own = place.gather(1, inside)
    heads = torch.where(chosen.repeat_interleave(k, dim=1), anchors.repeat_interleave(k, dim=1), own)
    heads = place.clone().scatter(1, inside, heads)
    weights = torch.ones(batch, length, device=device).masked_fill(gone, 1 / k)
    sizes = torch.ones_like(place).scatter(1, anchors, torch.where(chosen, k, 1)).gather(1, index)
    sizes = sizes.masked_fill(key.gather(1, index) == torch.inf, 0)
    links = slot.gather(1, heads).unsqueeze(-1)
    ragged = not isinstance(merged, int)
    return Reduction(index, sizes, length, links, weights.unsqueeze(-1), ragged=ragged, drops=False)
