"""Token-level correlations of a document crop: how repetitive it is, which tokens stand out (arXiv 2407.14439).

The authors published no code; where the paper is silent these functions are a definition of ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Rows of the similarity matrix at a time: only counts are needed, so the whole one never exists."""


def similar_counts(keys: Tensor, threshold: float) -> Tensor:
    """How many other tokens have keys of a cosine above a threshold.

    Args:
        keys: Keys, the heads side by side, (B, N, W).
        threshold: tau.

    Returns:
        int64, (B, N).
    """
    x = F.normalize(keys if keys.dtype == torch.float64 else keys.float(), dim=-1, eps=1e-12)
    found = []
    for start in range(0, x.shape[1], BLOCK):
        near = x[:, start : start + BLOCK] @ x.transpose(1, 2) > threshold
        near.diagonal(start, 1, 2).fill_(False)
        found.append(near.sum(-1))
    return torch.cat(found, dim=1)


def redundant(keys: Tensor, threshold: float = 0.7, share: float = 0.1) -> Tensor:
    """Tokens that at least a share of all others resemble, (B, N); see `similar_counts`.

    The information density of a crop is the share of tokens that are not redundant. It is used as a count: rounding
    the share up again would lose a token to floating point.
    """
    return similar_counts(keys, threshold) >= math.ceil(share * keys.shape[1] - 1e-9)


def outliers(values: Tensor, factor: float = 1.5) -> Tensor:
    """Values above the third quartile plus `factor` interquartile ranges, (..., N) -> mask; quartiles interpolate."""
    return values > upper_fence(values, factor).unsqueeze(-1)


def upper_fence(values: Tensor, factor: float = 1.5) -> Tensor:
    """Third quartile plus `factor` interquartile ranges, (..., N) -> (...)."""
    exact = values if values.dtype == torch.float64 else values.float()
    low, high = torch.quantile(exact, 0.25, dim=-1), torch.quantile(exact, 0.75, dim=-1)
    return high + factor * (high - low)


def sampling_keys(weights: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Keys whose k largest are a sample of k without replacement (Gumbel top-k), float64, (..., N).

    Args:
        weights: Not normalised probabilities, (..., N).
        uniform: Numbers in (0, 1) of the same shape; None gives the plain order of the weights.
    """
    weights = weights.double()
    logs = (weights / weights.sum(-1, keepdim=True)).clamp_min(1e-300).log()
    if uniform is None:
        return logs
    return logs - torch.log(-torch.log(uniform.double().clamp(1e-12, 1 - 1e-12)))
