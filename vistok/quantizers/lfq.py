"""Look-up free quantisation: every channel is a bit; in one id, or in groups of bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vistok.quantizers.base import MAX_ID_BITS, Positions, Quantized, Quantizer, require_positive, straight_through
from vistok.quantizers.bits import BitOrder, bits_to_groups, groups_to_bits
from vistok.quantizers.entropy import bits_entropies
from vistok.quantizers.usage import UsageTracker
from vistok.registry import register

LARGEST_DISTRIBUTION = 22
"""Bits of the largest distribution over codes that is formed (2^22 floats, 16 MB)."""


def byte_groups(dim: int) -> int:
    """Fewest groups of equal size with at most 8 bits each."""
    return next(g for g in range(-(-dim // 8), dim + 1) if dim % g == 0)


class SignQuantizer(Quantizer):
    """A quantizer whose codes are signs of the channels, +-magnitude; zero goes to minus, as in all official codes.

    Channels are group-major (channel = group * bits + bit). `ids_to_codes` is bit arithmetic and needs no table.

    Attributes:
        groups: Ids per token, G.
        bits_per_group: Bits of one id, at most 63.
        bit_order: Which end of an id channel 0 of its group is.
        magnitude: Absolute value of every code channel.
    """

    def __init__(self, *, dim: int, groups: int, bit_order: BitOrder, magnitude: float = 1.0) -> None:
        require_positive("dim", dim)
        require_positive("groups", groups)
        if dim % groups:
            raise ValueError(f"dim={dim} does not split into groups={groups} of equal size; choose a divisor of {dim}.")
        if dim // groups > MAX_ID_BITS:
            raise ValueError(
                f"{dim // groups} bits do not fit into one int64 id (at most {MAX_ID_BITS}). "
                f"Set groups={byte_groups(dim)}, i.e. {dim // byte_groups(dim)} bits an id, or another divisor."
            )
        if bit_order not in ("little", "big"):
            raise ValueError(f"bit_order is 'little' or 'big', got {bit_order!r}.")
        self.bits_per_group = dim // groups
        super().__init__(dim, (2**self.bits_per_group,) * groups)
        self.usage = UsageTracker(self.vocab_sizes, bitwise=True)
        self.groups = groups
        self.bit_order: BitOrder = bit_order
        self.magnitude = magnitude

    def sign_ids(self, z: Tensor) -> Tensor:
        """Ids of the signs of (..., D): int64 (...), or (..., G) with groups."""
        return self.ungrouped(bits_to_groups(z > 0, self.groups, self.bit_order))

    def signs(self, z: Tensor) -> Tensor:
        """+-magnitude with the signs of z, (..., D); minus for zero."""
        return torch.where(z > 0, self.magnitude, -self.magnitude)

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Signs of the bits: int64 (B, N), or (B, N, G) with groups -> (B, N, D) float32.

        Raises:
            ValueError: Wrong number of groups, or an id outside the vocabulary.
        """
        bits = groups_to_bits(self.grouped(self.check_ids(ids)), self.bits_per_group, self.bit_order)
        return torch.where(bits, self.magnitude, -self.magnitude)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids of the signs: (B, N, D) -> int64 (B, N), or (B, N, G) with groups.

        Raises:
            ValueError: Wrong number of channels.
        """
        return self.sign_ids(self.check_codes(codes))


def require_distribution(kind: str, bits: int, dim: int) -> None:
    """Refuse a batch distribution that no memory holds.

    Raises:
        ValueError: More than 2^22 codes, with the advice to group.
    """
    if bits > LARGEST_DISTRIBUTION:
        raise ValueError(
            f"{kind} with {bits} bits in one group needs a batch distribution over 2^{bits} codes, more than "
            f"2^{LARGEST_DISTRIBUTION}, the largest that is formed. Group the bits: "
            f"{{name: group_lfq, dim: {dim}, groups: {byte_groups(dim)}}}, or use fewer bits."
        )


@register("quantizer", "group_lfq")
class GroupLFQ(SignQuantizer):
    """Group-wise look-up free quantisation, GQ (WeTok, arXiv 2508.05599; `num_codebooks` of the LFQ class).

    Each of G groups of b bits has an id of its own; the channels of a code are +-1. Loss terms with p = softmax over
    the 2^b sign patterns c of 2 z.c / T: entropy_sample = mean over tokens and groups of H(p); entropy_batch =
    -sum P log(P + 1e-5); commitment = mean((z - sg q)^2). Released code averages P over groups as well: one pooled
    distribution of at most b ln 2 nats; "per_group" has one per group (mean of their entropies). Published weights:
    0.1 (entropy_sample - entropy_batch) + 0.25 commitment. The total is negative while codes are in even use.

    Exact by the factorisation over bits: cost O(N G 2^(b/2)), no (tokens x codes) tensor. Released code ignores its
    `inv_temperature`, calls its order "big endian" though it is little, and does not sum P over processes: we do.

    Args:
        dim: Channels, i.e. bits per token.
        groups: Ids per token; dim / groups at most 22.
        bit_order: Which end of its id a group's channel 0 is; little in Open-MAGVIT2, WeTok and GigaTok, big in
            vector-quantize-pytorch.
        entropy_pool: Batch distribution pooled over groups, or one per group.
        temperature: T.
        entropy_weight: Weight of (entropy_sample - entropy_batch); the two can be set apart in `weights`.
        commitment_weight: Weight of the commitment term.

    Example:
        >>> import torch, vistok
        >>> q = vistok.create("quantizer", "group_lfq", dim=32, groups=4)
        >>> q(torch.randn(2, 256, 32)).ids.shape, q.vocab_sizes
        (torch.Size([2, 256, 4]), (256, 256, 256, 256))
    """

    def __init__(
        self,
        *,
        dim: int,
        groups: int,
        bit_order: BitOrder = "little",
        entropy_pool: Literal["groups", "per_group"] = "groups",
        temperature: float = 0.01,
        entropy_weight: float = 0.1,
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__(dim=dim, groups=groups, bit_order=bit_order)
        require_distribution("group_lfq" if groups > 1 else "lfq", self.bits_per_group, dim)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}; published is 0.01.")
        self.entropy_pool = entropy_pool
        self.temperature = temperature
        self.weights = {
            "entropy_sample": entropy_weight,
            "entropy_batch": -entropy_weight,
            "commitment": commitment_weight,
        }

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        q = self.signs(z)
        # softmax over sign patterns of 2 z.c / T: odds of a bit are e^(4 z / T)
        logit = z.unflatten(-1, (self.groups, self.bits_per_group)) * (4 / self.temperature)
        losses = bits_entropies(logit, positions, pooled=self.entropy_pool == "groups")
        losses["commitment"] = positions.mean((z - q).square())
        return self.result(straight_through(z, q), self.sign_ids(z), losses)


@register("quantizer", "lfq")
class LFQ(GroupLFQ):
    """Look-up free quantisation (MAGVIT-v2, Yu et al. 2023, arXiv 2310.05737, eq. 3-6): one id of `dim` bits.

    `group_lfq` with one group; see there for the losses. The batch entropy ranges over all 2^dim codes, from two
    half tables and one matrix product (official codes build a (tokens x 2^dim) softmax): dim at most 22.

    Args:
        dim: Channels, i.e. bits per token.
        bit_order: Which end of the id channel 0 is.
        temperature: T of the entropies.
        entropy_weight: Weight of (entropy_sample - entropy_batch).
        commitment_weight: Weight of the commitment term.
    """

    def __init__(
        self,
        *,
        dim: int,
        bit_order: BitOrder = "little",
        temperature: float = 0.01,
        entropy_weight: float = 0.1,
        commitment_weight: float = 0.25,
    ) -> None:
        require_distribution("lfq", require_positive("dim", dim), dim)
        super().__init__(
            dim=dim,
            groups=1,
            bit_order=bit_order,
            temperature=temperature,
            entropy_weight=entropy_weight,
            commitment_weight=commitment_weight,
        )
