"""Scores of tokens from attention rows and from transitions, all in float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Direction = Literal["signed", "abs"]
Row = Literal["probability", "logit", "one_head"]
CHUNK = 256  # query rows at a time: an attention map never exists


def row_probabilities(q: Tensor, k: Tensor, *, scale: float, visible: Tensor) -> Tensor:
    """Attention probabilities of a few query rows over all keys; O(rows x keys), grouped heads included.

    Args:
        q: Queries after rotation, (B, heads, R, d).
        k: Keys after rotation, (B, kv_heads, L, d).
        scale: Factor of the logits.
        visible: True where a row may look, (B, R, L).

    Returns:
        float32, (B, heads, R, L); zero where a row sees nothing.
    """
    batch, heads, rows, d = q.shape
    groups = heads // k.shape[1]
    grouped = q.reshape(batch, k.shape[1], groups * rows, d)
    logits = (grouped @ k.transpose(2, 3)).float() * scale  # (B, kv_heads, groups * R, L)
    logits = logits.view(batch, heads, rows, -1)
    hidden = ~visible.unsqueeze(1)
    probabilities = logits.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
    return probabilities.masked_fill(hidden, 0)


def class_row(q: Tensor, k: Tensor, *, scale: float, row: Row = "probability") -> Tensor:
    """Attention of a class token, which stands in front of the others; O(keys).

    Args:
        q: Its query, (B, heads, 1, d).
        k: Keys of all, the class token first, (B, heads, T, d).
        scale: Factor of the logits.
        row: Mean over heads of the probabilities or of the logits, or the probabilities of one head as wide as all
            together (logits over the root of the full width, as PruMerge has it).

    Returns:
        To the other tokens, float32, (B, T - 1).
    """
    logits = (q.float() @ k.float().transpose(2, 3))[:, :, 0]  # (B, heads, T)
    if row == "logit":
        return (logits.mean(1) * scale)[:, 1:]
    if row == "one_head":
        wide: Tensor = logits.sum(1) * (q.shape[1] * q.shape[3]) ** -0.5
        return wide.softmax(-1)[:, 1:]
    found: Tensor = (logits * scale).softmax(-1).mean(1)
    return found[:, 1:]


def received_row(q: Tensor, k: Tensor, *, scale: float, row: Row = "probability") -> Tensor:
    """What every token receives from all queries on average: stands in where a tower has no class token.

    Args:
        q: Queries of all tokens, (B, heads, T, d).
        k: Keys, (B, heads, T, d).
        scale: Factor of the logits.
        row: Mean over heads and queries of the probabilities (in chunks of queries, also for `one_head`) or of the
            logits, which need the mean query alone.

    Returns:
        float32, (B, T).
    """
    q, k = q.float() * scale, k.float()
    if row == "logit":
        return (q.mean(2, keepdim=True) @ k.transpose(2, 3))[:, :, 0].mean(1)
    total = sum((part @ k.transpose(2, 3)).softmax(-1).sum((1, 2)) for part in q.split(CHUNK, dim=2))
    assert isinstance(total, Tensor)
    return total / (q.shape[1] * q.shape[2])


def mean_over_rows(values: Tensor, row_valid: Tensor) -> Tensor:
    """Mean over the valid rows: values (B, R, L), row_valid (B, R) -> (B, L)."""
    weight = row_valid.unsqueeze(-1).to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp_min(1)


def transition(before: Tensor, after: Tensor, valid: Tensor, direction: Direction = "signed") -> Tensor:
    """Token transition variation of one module (TransPrune, arXiv 2507.20630, section 3).

    The norm ratio |after| / |before| times exp(1 - cosine), the latter normalised over the row's tokens. The paper
    takes 1 - |cosine| (`abs`), the released code 1 - cosine (`signed`, what the golden file holds).

    Args:
        before: What the module received, after its norm, (B, L, D).
        after: What it returned, before the residual sum, (B, L, D).
        valid: Real tokens, (B, L). The released code sums over the whole batch; per row it does not depend on the
            batch and equals it for one sample.
        direction: Which of the two.

    Returns:
        float32, (B, L); 0 at padding.
    """
    before, after = before.float(), after.float()
    size_before, size_after = before.norm(dim=-1), after.norm(dim=-1)
    cosine = (before * after).sum(-1) / (size_before.clamp_min(1e-8) * size_after.clamp_min(1e-8))
    turned = torch.exp(1 - (cosine.abs() if direction == "abs" else cosine)) * valid
    ratio = size_after / size_before.masked_fill(~valid, 1)
    term: Tensor = ratio * turned / turned.sum(1, keepdim=True).clamp_min(1e-8) * valid
    return term


def matrix_rank(matrix: Tensor) -> Tensor:
    """Numerical rank with the tolerance largest singular value x longer side x eps, float32, (...)."""
    matrix = matrix.float()
    values = torch.linalg.svdvals(matrix)
    eps = torch.finfo(torch.float32).eps
    rank: Tensor = (values > values.amax(-1, keepdim=True) * max(matrix.shape[-2:]) * eps).sum(-1)
    return rank


def rotary_gravity(angles: Tensor, distance: Tensor, floor: float = 0.1) -> Tensor:
    """Weight that rotary positions alone give to a distance (SparseVLM+): a table instead of an L x L product.

    All-ones queries and keys of a rotary layer have the product 2 * sum_i cos(distance * theta_i), / sqrt(head width).

    Args:
        angles: theta_i, the inverse frequencies, half as many as a head is wide.
        distance: Row position minus column position, any shape.
        floor: The weight is kept above this share of its value at distance 0: beyond 725 tokens (heads of 64) it
            passes through zero, and dividing by it would make the scores explode. LLaVA-1.5 never gets there.
    """
    root = (2 * len(angles)) ** 0.5
    steps = torch.arange(int(distance.abs().max()) + 1, device=distance.device, dtype=torch.float32)
    table = 2 * torch.cos(steps.unsqueeze(1) * angles.float().to(distance.device)).sum(1) / root
    found: Tensor = table.clamp_min(floor * root)[distance.abs()]
    return found


def rotary_gravity_product(angles: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same weight as released: the product of rotated all-ones vectors, without a floor.

    Where it nearly vanishes the rounding of this product decides the scores, so parity needs it.

    Args:
        angles: Inverse frequencies.
        rows: Positions of the query rows, (B, R).
        columns: Positions of the columns, (B, L).

    Returns:
        float32, (B, R, L).
    """

    def ones(positions: Tensor) -> Tensor:
        phase = positions.unsqueeze(-1).float() * angles.float()
        return torch.cat([phase.cos() - phase.sin(), phase.cos() + phase.sin()], dim=-1)

    product: Tensor = ones(rows) @ ones(columns).transpose(1, 2) / (2 * len(angles)) ** 0.5
    return product
