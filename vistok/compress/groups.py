"""Tokens that are groups of patches: reductions of groups as reductions of patches."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.compress.reduction import Reduction


def spread_tokens(x: Tensor, prefix: int, group: int) -> Tensor:
    """Numbers of tokens as numbers of patches, those of a group side by side: (B, N) -> (B, T); -1 stays."""
    if group == 1:
        return x
    rest = x[:, prefix:, None]
    patches = (rest - prefix) * group + torch.arange(group, device=x.device) + prefix
    return torch.cat([x[:, :prefix], torch.where(rest < 0, -1, patches).flatten(1)], dim=1)


def spread_out(reduction: Reduction, prefix: int, group: int) -> Reduction:
    """A reduction of prefix tokens and groups as one of patches, those of a group side by side."""
    if group == 1:
        return reduction

    def copies(x: Tensor) -> Tensor:
        return torch.cat([x[:, :prefix], x[:, prefix:].repeat_interleave(group, dim=1)], dim=1)

    links = weights = None
    if reduction.links is not None and reduction.weights is not None:
        links = torch.stack([spread_tokens(column, prefix, group) for column in reduction.links.unbind(2)], dim=2)
        weights = copies(reduction.weights)
    return Reduction(
        index=spread_tokens(reduction.index, prefix, group),
        sizes=copies(reduction.sizes),
        length=prefix + group * (reduction.length - prefix),
        links=links,
        weights=weights,
        ragged=reduction.ragged,
        drops=reduction.drops,
    )
