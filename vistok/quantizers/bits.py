"""Ids, bits and bytes in integer arithmetic; the order of bits is always said.

`little`: bit 0 is the least significant, id = sum_k bit_k 2^k (Open-MAGVIT2, WeTok, GigaTok). `big`: bit 0 is the most
significant (vector-quantize-pytorch, Cosmos, BSQ-ViT). At most 63 bits make one int64 id; more stay grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

BitOrder = Literal["little", "big"]


def _shifts(bits: int, order: BitOrder, device: torch.device) -> Tensor:
    if order not in ("little", "big"):
        raise ValueError(f"bit order is 'little' or 'big', got {order!r}.")
    if not 1 <= bits <= 63:
        raise ValueError(f"an int64 id holds 1 to 63 bits, got {bits}. Split the token into groups, one id each.")
    shifts = torch.arange(bits, device=device)
    return shifts if order == "little" else shifts.flip(0)


def bits_to_ids(bits: Tensor, order: BitOrder = "little") -> Tensor:
    """Bits (..., b), bool or 0/1 integers -> ids int64 (...), b <= 63.

    Raises:
        ValueError: More than 63 bits, or an unknown order.
    """
    return (bits.long() << _shifts(bits.shape[-1], order, bits.device)).sum(-1)


def ids_to_bits(ids: Tensor, bits: int, order: BitOrder = "little") -> Tensor:
    """Ids int64 (...) -> bits, bool (..., bits), bits <= 63.

    Raises:
        ValueError: More than 63 bits, or an unknown order.
    """
    return ((ids.unsqueeze(-1) >> _shifts(bits, order, ids.device)) & 1).bool()


def split_ids(ids: Tensor, bits: Sequence[int]) -> Tensor:
    """Cut ids into factors (Open-MAGVIT2's and WeTok's token factorisation).

    Args:
        ids: int64 (...).
        bits: Bits of each factor, least significant factor first.

    Returns:
        int64 (..., G).

    Raises:
        ValueError: More than 63 bits in all.
    """
    _require_63(bits)
    parts, shift = [], 0
    for width in bits:
        parts.append((ids >> shift) & ((1 << width) - 1))
        shift += width
    return torch.stack(parts, dim=-1)


def merge_ids(ids: Tensor, bits: Sequence[int]) -> Tensor:
    """Inverse of `split_ids`: int64 (..., G) -> (...).

    Raises:
        ValueError: More than 63 bits in all, or another number of groups.
    """
    _require_63(bits)
    if ids.shape[-1] != len(bits):
        raise ValueError(f"ids have {ids.shape[-1]} groups and bits names {len(bits)}.")
    merged, shift = torch.zeros_like(ids[..., 0]), 0
    for group, width in enumerate(bits):
        merged = merged | (ids[..., group] << shift)
        shift += width
    return merged


def _require_63(bits: Sequence[int]) -> None:
    if sum(bits) > 63 or min(bits, default=0) < 1:
        raise ValueError(f"factors of {list(bits)} bits: each needs at least 1, all together at most 63 for an int64.")


def groups_to_bits(ids: Tensor, bits: int, order: BitOrder = "little") -> Tensor:
    """Grouped ids int64 (..., G) -> all bits of the token, bool (..., G * bits), group by group."""
    return ids_to_bits(ids, bits, order).flatten(-2)


def bits_to_groups(bits: Tensor, groups: int, order: BitOrder = "little") -> Tensor:
    """Bits (..., d) -> grouped ids int64 (..., groups); d must be a multiple of groups.

    Raises:
        ValueError: d is not a multiple of groups, or more than 63 bits per group.
    """
    if bits.shape[-1] % groups:
        raise ValueError(f"{bits.shape[-1]} bits do not split into {groups} equal groups.")
    return bits_to_ids(bits.unflatten(-1, (groups, -1)), order)


def pack_bits(bits: Tensor, order: BitOrder = "little") -> Tensor:
    """Bits (..., d) -> bytes, uint8 (..., ceil(d / 8)), zero-padded at the end; as np.packbits(bitorder=order)."""
    missing = -bits.shape[-1] % 8
    padded = torch.nn.functional.pad(bits.long(), (0, missing))
    return bits_to_ids(padded.unflatten(-1, (-1, 8)), order).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, order: BitOrder = "little") -> Tensor:
    """Inverse of `pack_bits`: uint8 (..., bytes) -> bool (..., bits).

    Raises:
        ValueError: Fewer bytes than the bits need.
    """
    if packed.shape[-1] * 8 < bits:
        raise ValueError(f"{bits} bits need {-(-bits // 8)} bytes and got {packed.shape[-1]}.")
    return ids_to_bits(packed.long(), 8, order).flatten(-2)[..., :bits]
