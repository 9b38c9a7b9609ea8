"""Which of given vectors sum to a code: the bits behind a binary latent."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_FREE = 16
"""Vectors beyond their rank whose bits are tried one assignment after another, 2^16 at most."""

_CHUNK = 2**22


def subset_bits(codes: Tensor, vectors: Tensor) -> Tensor:
    """Bits of sums of vectors, exact or refused.

    Vectors that are linearly independent give their bits by a linear map. Of more vectors than that, `rank` independent
    ones are chosen, every assignment of the others' bits is taken off the code, and the one that leaves bits is it:
    generic vectors have no second one.

    Args:
        codes: (N, D), each the sum of a subset of the vectors in float32.
        vectors: (K, D) float32.

    Returns:
        bool (N, K).

    Raises:
        ValueError: Too many dependent vectors to try their bits, codes that are no such sum, or codes that are more
            than one.
    """
    table, codes = vectors.detach().double(), codes.double()
    order, rank = _independent_first(table)
    free = len(table) - rank
    if free > MOST_FREE:
        raise ValueError(
            f"The {len(table)} bit vectors have rank {rank}: {free} bits would have to be tried, 2^{free} assignments, "
            f"and at most 2^{MOST_FREE} are. Keep the ids, or give dim of at least num_bits."
        )
    inverse = torch.linalg.pinv(table[order[:rank]])  # (D, rank)
    tried = (torch.arange(2**free, device=codes.device)[:, None] >> torch.arange(free, device=codes.device)) & 1
    taken = tried.double() @ table[order[rank:]]  # (2^free, D)
    size = torch.maximum(codes.abs().amax(), table.abs().sum(0).amax())
    slack = (1e-6 * len(table) ** 0.5 * size * inverse.abs().sum(0).amax()).clamp_max(0.2)
    parts = [
        _choose(part, table[order[:rank]], inverse, tried, taken, slack)
        for part in codes.split(max(1, _CHUNK // (len(tried) * max(rank, 1))))
    ]
    bits = torch.zeros(len(codes), len(table), dtype=torch.bool, device=codes.device)
    bits[:, order] = torch.cat(parts) if parts else bits
    return bits


def _independent_first(table: Tensor) -> tuple[Tensor, int]:
    """Rows in an order that begins with independent ones, far from dependent (pivoted Gram-Schmidt); and their number.

    The rank is that of float32 vectors: what is left of a row below 1e-6 of the largest is rounding.
    """
    rest, order = table.clone(), []
    limit = 1e-6 * table.norm(dim=1).amax() if len(table) else table.new_zeros(())
    for _ in range(min(table.shape)):
        lengths = rest.norm(dim=1)
        at = int(lengths.argmax())
        if lengths[at] <= limit:
            break
        order.append(at)
        unit = rest[at] / lengths[at]
        rest = rest - (rest @ unit)[:, None] * unit
        rest[order] = 0.0
    others = [i for i in range(len(table)) if i not in set(order)]
    return torch.tensor([*order, *others], dtype=torch.int64, device=table.device), len(order)


def _choose(codes: Tensor, chosen: Tensor, inverse: Tensor, tried: Tensor, taken: Tensor, slack: Tensor) -> Tensor:
    """Bits (N, K) of the chosen vectors, then of the tried ones; see `subset_bits`."""
    share = (codes @ inverse)[:, None] - taken @ inverse  # (N, 2^free, rank)
    whole = share.round().clamp_(0, 1)
    error = share.sub_(whole).abs_().amax(-1) if len(chosen) else codes.new_zeros(len(codes), len(tried))
    fits = error <= slack  # (N, 2^free)
    if not bool(fits.any(-1).all()):
        raise ValueError(
            "These codes are no sums of the bit vectors, or the vectors are too nearly dependent to tell which. "
            "Keep the ids."
        )
    if bool((fits.sum(-1) > 1).any()):
        raise ValueError("These codes are the sum of more than one set of bit vectors. Keep the ids.")
    best = error.argmin(-1)
    rows = torch.arange(len(codes), device=codes.device)
    found = torch.cat([whole[rows, best], tried[best].double()], dim=-1) > 0.5
    left = codes - found[:, : len(chosen)].double() @ chosen - taken[best]
    if bool((left.abs() > 1e-4 * left.new_tensor(1.0).maximum(codes.abs().amax())).any()):
        raise ValueError("These codes are no sums of the bit vectors: they leave their span. Keep the ids.")
    return found
