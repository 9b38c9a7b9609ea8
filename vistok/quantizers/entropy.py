"""Entropies of code assignments, exact, without a (tokens x codes) tensor.

A quantizer wants the entropy of each token's assignment low (decided) and that of the mean assignment high (all codes
in use): `entropy_sample` and `entropy_batch`, in nats. Where codes are sign patterns, an assignment factorises over
the bits, and both follow from sums over bits and one product of two half tables. Where codes are a table, the softmax
is walked tile by tile, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vistok.distributed import sum_with_local_gradient, world_size
from vistok.quantizers.base import Positions
from vistok.quantizers.search import TILE, tiles

LOG_FLOOR = -80.0
"""Least log-probability: e^-80 is nothing beside 1, and processors take ten times as long where exp underflows."""

Cotangent = Callable[[Tensor, slice, slice], Tensor]


def distribution_entropy(p: Tensor, eps: float) -> Tensor:
    """-sum p log(p + eps) over all elements; the eps keeps the gradient finite at p = 0.

    LFQ, GQ, IBQ and GigaTok use 1e-5, BSQ-ViT 1e-8.
    """
    return -(p * (p + eps).log()).sum()


class _BitEntropy(torch.autograd.Function):
    """Entropy of a Bernoulli variable as a function of its logit; see `bit_entropy`."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor) -> Tensor:
        ctx.save_for_backward(logit)
        size = logit.abs()
        # |x| sigma(-|x|) + log(1 + e^-|x|): no difference of large numbers
        entropy: Tensor = size * torch.sigmoid(-size) + torch.log1p(torch.exp(-size))
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logit,) = ctx.saved_tensors
        slope: Tensor = -grad * logit * torch.sigmoid(logit) * torch.sigmoid(-logit)
        return slope


def bit_entropy(logit: Tensor) -> Tensor:
    """Entropy h2(sigma(x)) of each element, in nats; stable for any x."""
    found: Tensor = _BitEntropy.apply(logit)
    return found


class _Centred(torch.autograd.Function):
    """The identity; the gradient loses its mean over the codes.

    Probabilities sum to one, so a constant added to their gradient changes nothing but rounding: where use is nearly
    even, the gradient of the batch entropy is nearly constant, and would cancel to noise.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return p.view_as(p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        centred: Tensor = grad - grad.mean(-1, keepdim=True)
        return centred


def pattern_probabilities(logit: Tensor) -> Tensor:
    """Probability of each bit pattern of independent bits: logits (..., b) -> (..., 2^b), bit 0 least significant."""
    one, zero = torch.sigmoid(logit), torch.sigmoid(-logit)
    table = torch.ones_like(logit[..., :1])
    for k in range(logit.shape[-1]):
        table = torch.cat([table * zero[..., k : k + 1], table * one[..., k : k + 1]], dim=-1)
    return table


def pattern_sum(logit: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum over tokens of the pattern probabilities, from two half tables and one matrix product.

    p(c) = prod_k sigma(+-x_k) splits into low and high bits, so sum_i p_i = B^T A with A (M, 2^(b/2)) and
    B (M, 2^(b - b/2)). Tokens are taken in chunks that are recomputed in the backward pass when there are several.

    Args:
        logit: Logits of the bits being 1, (G, M, b).
        weight: Weight of each token, (M,), or None for ones.

    Returns:
        (G, 2^b), bit 0 least significant.
    """
    bits = logit.shape[-1]
    chunk = max(1, TILE // (2 ** (bits - bits // 2) * max(1, logit.shape[0])))
    if logit.shape[1] <= chunk:
        return _centred(_half_tables(logit, weight))
    total = logit.new_zeros(logit.shape[0], 2**bits)
    for i in range(0, logit.shape[1], chunk):
        part = None if weight is None else weight[i : i + chunk]
        total = total + checkpoint(_half_tables, logit[:, i : i + chunk], part, use_reentrant=False)
    return _centred(total)


def _centred(p: Tensor) -> Tensor:
    same: Tensor = _Centred.apply(p)
    return same


def _half_tables(logit: Tensor, weight: Tensor | None) -> Tensor:
    half = logit.shape[-1] // 2
    low, high = pattern_probabilities(logit[..., :half]), pattern_probabilities(logit[..., half:])
    if weight is not None:
        low = low * weight.unsqueeze(-1)
    return (high.transpose(1, 2) @ low).flatten(1)  # (G, 2^(b - half) * 2^half)


def global_mean(local_sum: Tensor, positions: Positions, per_position: int = 1) -> Tensor:
    """Sums over this process' counted positions -> mean over all processes, gradient right under DDP.

    P = sg(P_global) + P_local - sg(P_local), generalised to processes with unequal numbers of positions.

    Args:
        local_sum: Sum over counted positions, any shape.
        positions: What counts.
        per_position: Terms summed per position (groups, when they are pooled).
    """
    if not positions.synced:
        return local_sum / (positions.count * per_position).clamp_min(1e-6)
    total = positions.count * world_size() * per_position
    return sum_with_local_gradient(local_sum) / total.clamp_min(1e-6)


def bits_entropies(logit: Tensor, positions: Positions, *, pooled: bool, eps: float = 1e-5) -> dict[str, Tensor]:
    """Both entropies of grouped sign codes (MAGVIT-v2 LFQ, arXiv 2310.05737; GQ, arXiv 2508.05599).

    Equal to the softmax over all 2^b patterns that the official codes build, by the factorisation over bits.

    Args:
        logit: Logits of the bits being +1, (B, N, G, b); 4 z / T for LFQ.
        positions: What counts.
        pooled: One distribution over the patterns of all groups (released WeTok code), or one per group.
        eps: Inside the logarithm of the batch entropy.

    Returns:
        entropy_sample: Mean over positions and groups. entropy_batch: Entropy of the mean distribution; mean over
        groups unless pooled.
    """
    groups = logit.shape[2]
    sample = positions.mean(bit_entropy(logit).sum(-1))
    flat = logit.flatten(0, 1)  # (M, G, b)
    weight = positions.flat()
    if weight is not None:
        weight = weight.to(logit.dtype)
    if pooled:
        weight = None if weight is None else weight.repeat_interleave(groups)
        total = pattern_sum(flat.flatten(0, 1).unsqueeze(0), weight)
        return {
            "entropy_sample": sample,
            "entropy_batch": distribution_entropy(global_mean(total, positions, groups), eps),
        }
    total = pattern_sum(flat.transpose(0, 1), weight)
    return {
        "entropy_sample": sample,
        "entropy_batch": distribution_entropy(global_mean(total, positions), eps) / groups,
    }


# -- softmax over a table, tile by tile --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logits:
    """Logits scale * z.e + bias of tokens and codes, known by tiles.

    Attributes:
        z: (N, D).
        table: (C, D).
        bias: (C,) or None.
        scale: Factor of the products.
    """

    z: Tensor
    table: Tensor
    bias: Tensor | None = None
    scale: float = 1.0

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Slices that cover tokens and codes."""
        return tiles(self.z, self.table)

    def tile(self, rows: slice, cols: slice) -> Tensor:
        """The logits of one tile."""
        if self.bias is None:
            return (self.z[rows] @ self.table[cols].T).mul_(self.scale)
        return torch.addmm(self.bias[cols], self.z[rows], self.table[cols].T, alpha=self.scale)

    def log_softmax(self, rows: slice, cols: slice, normaliser: Tensor) -> Tensor:
        """Log-probabilities of one tile, from `best`, at least `LOG_FLOOR`."""
        # maximum first, then log of the sum: their sum would be rounded at the size of the logits, not of log q
        top, log_total = normaliser[:, rows].unsqueeze(-1)
        return self.tile(rows, cols).sub_(top).sub_(log_total).clamp_min_(LOG_FLOOR)

    @torch.no_grad()
    def best(self) -> tuple[Tensor, Tensor]:
        """Arg max, int64 (N,), the first of equals; and the softmax' normaliser (2, N), maximum and log of the sum."""
        top = self.z.new_full((len(self.z),), -float("inf"))
        total = torch.zeros_like(top)
        index = torch.zeros(len(self.z), dtype=torch.int64, device=self.z.device)
        for rows, cols in self.tiles():
            logit = self.tile(rows, cols)
            at = logit.argmax(-1)
            value = logit.gather(-1, at.unsqueeze(-1)).squeeze(-1)
            index[rows] = torch.where(value > top[rows], at + cols.start, index[rows])
            higher = torch.maximum(value, top[rows])
            shares = logit.sub_(higher.unsqueeze(-1)).clamp_min_(LOG_FLOOR).exp_()
            total[rows] = total[rows] * (top[rows] - higher).exp() + shares.sum(-1)
            top[rows] = higher
        return index, torch.stack([top, total.log()])


def softmax_backward(logits: Logits, normaliser: Tensor, cotangent: Cotangent) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient through q = softmax(logits), tiles recomputed: d logit = q (r - sum_c q r).

    Args:
        logits: Of tokens and codes.
        normaliser: From `Logits.best`.
        cotangent: Gives a tile of r = d loss / d q from (log q of the tile, token slice, code slice).

    Returns:
        Gradients of z, table and bias.
    """
    z, table, bias, scale = logits.z, logits.table, logits.bias, logits.scale
    mean = z.new_zeros(len(z))
    for rows, cols in logits.tiles():
        log_q = logits.log_softmax(rows, cols, normaliser)
        r = cotangent(log_q, rows, cols)
        mean[rows] += r.mul_(log_q.exp_()).sum(-1)
    d_z, d_table = torch.zeros_like(z), torch.zeros_like(table)
    d_bias = None if bias is None else torch.zeros_like(bias)
    for rows, cols in logits.tiles():
        log_q = logits.log_softmax(rows, cols, normaliser)
        r = cotangent(log_q, rows, cols)
        d_logit = r.sub_(mean[rows].unsqueeze(-1)).mul_(log_q.exp_())
        d_z[rows].addmm_(d_logit, table[cols], alpha=scale)
        d_table[cols].addmm_(d_logit.T, z[rows], alpha=scale)
        if d_bias is not None:
            d_bias[cols] += d_logit.sum(0)
    return d_z, d_table, d_bias


class _SoftmaxStatistics(torch.autograd.Function):
    """Entropy of each token's softmax (N,) and the weighted sum of the softmaxes (C,)."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, table: Tensor, bias: Tensor | None, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        logits = Logits(z, table, bias, scale)
        _, normaliser = logits.best()
        entropy, total = z.new_zeros(len(z)), z.new_zeros(len(table))
        for rows, cols in logits.tiles():
            log_q = logits.log_softmax(rows, cols, normaliser)
            q = log_q.exp()
            total[cols] += q.sum(0) if weight is None else weight[rows] @ q
            entropy[rows] -= q.mul_(log_q).sum(-1)
        ctx.save_for_backward(z, table, bias, weight, normaliser)
        ctx.scale = scale
        return entropy, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_entropy: Tensor, d_total: Tensor) -> tuple[Tensor | None, ...]:
        z, table, bias, weight, normaliser = ctx.saved_tensors
        d_total = d_total - d_total.mean()  # as in _Centred

        def cotangent(log_q: Tensor, rows: slice, cols: slice) -> Tensor:
            outer = d_total[cols] if weight is None else weight[rows].unsqueeze(-1) * d_total[cols]
            return outer - d_entropy[rows].unsqueeze(-1) * log_q

        return *softmax_backward(Logits(z, table, bias, ctx.scale), normaliser, cotangent), None, None


def softmax_entropies(
    z: Tensor, table: Tensor, positions: Positions, *, scale: float, bias: Tensor | None = None, eps: float = 1e-5
) -> dict[str, Tensor]:
    """Both entropies of softmax(scale * z.e + bias) over the rows of a table (GigaTok, IBQ).

    Memory is that of z, the table and one tile, forward and backward.

    Args:
        z: Features, (B, N, D).
        table: Codes, (C, D).
        positions: What counts.
        scale: 1 / T for dot products, 2 / T for distances.
        bias: (C,), -|e|^2 / T for distances.
        eps: Inside the logarithm of the batch entropy.

    Returns:
        entropy_sample: Mean entropy of a position. entropy_batch: Entropy of the mean distribution.
    """
    weight = positions.flat()
    if weight is not None:
        weight = weight.to(z.dtype)
    entropy, total = _SoftmaxStatistics.apply(z.reshape(-1, z.shape[-1]), table, bias, weight, scale)
    return {
        "entropy_sample": positions.mean(entropy.reshape(z.shape[:-1])),
        "entropy_batch": distribution_entropy(global_mean(total, positions), eps),
    }
