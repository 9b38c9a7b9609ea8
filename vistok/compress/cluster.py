"""Density-peak clustering of tokens, deterministic, for samples with different numbers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(x: Tensor, member: Tensor, clusters: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Assign tokens to density peaks (the rule of SparseVLM 1.x, without its random noise).

    Distances are Euclidean / sqrt(D); the density of a token is exp(-mean squared distance to its c nearest, itself
    included); its separation the distance to the nearest denser token (the largest distance if there is none); centres
    are the c largest products of the two. Ties go to the lower index; equal densities count as not denser, as in the
    released code, which breaks them by noise.

    Args:
        x: Tokens, (B, N, D).
        member: Tokens that take part, (B, N).
        clusters: c, clusters of each sample, (B,).
        most: The largest c, if known on the host.

    Returns:
        Rank of each token's centre (0 is the strongest), (B, N), -1 for tokens that take no part; and the index of
        every centre by rank, (B, max c), -1 beyond c.
    """
    x = x.float()
    batch, n, width = x.shape
    most = max(int(clusters.max()) if most is None else most, 1)
    far = torch.finfo(torch.float32).max
    pair = member.unsqueeze(1) & member.unsqueeze(2)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    nearest = distance.masked_fill(~pair, far).sort(dim=-1).values[..., :most]
    used = torch.arange(nearest.shape[-1], device=x.device) < clusters.view(-1, 1, 1)
    squared = torch.where(used & (nearest < far), nearest, torch.zeros_like(nearest)) ** 2
    density = torch.exp(-squared.sum(-1) / clusters.clamp_min(1).unsqueeze(1)).masked_fill(~member, -1)
    denser = density.unsqueeze(1) > density.unsqueeze(2)  # [i, j]: j is denser than i
    largest = distance.masked_fill(~pair, 0).flatten(1).amax(1).view(-1, 1, 1)
    separation = torch.where(denser & pair, distance, largest.expand_as(distance)).amin(-1)
    strength = (density * separation).masked_fill(~member, -1)
    centres = strength.sort(dim=1, descending=True, stable=True).indices[:, :most]
    alive = torch.arange(most, device=x.device)[: centres.shape[1]] < clusters.unsqueeze(1)
    to_centre = distance.gather(2, centres.unsqueeze(1).expand(batch, n, -1)).masked_fill(~alive.unsqueeze(1), far)
    label = to_centre.argmin(-1)
    own = torch.arange(centres.shape[1], device=x.device).expand_as(centres)
    label = _put(label, centres, own, alive)
    return label.masked_fill(~member, -1), centres.masked_fill(~alive, -1)


def _put(label: Tensor, centres: Tensor, own: Tensor, alive: Tensor) -> Tensor:
    """Every centre belongs to itself."""
    n = label.shape[1]
    padded = torch.cat([label, label[:, :1]], dim=1)
    return padded.scatter(1, torch.where(alive, centres, n), own)[:, :n]
