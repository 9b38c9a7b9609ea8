"""Finite scalar quantisation: a small fixed grid per channel, no table, no loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vistok.quantizers.base import Positions, Quantized, Quantizer, require_positive, straight_through
from vistok.registry import register

LARGEST_LEVEL = 2**22
"""Levels of one channel that float32 codes tell apart with a bit to spare."""


class _MixedRadix(Quantizer):
    """Shared by the two FSQ kinds: levels <-> ids in integer arithmetic, first channel least significant."""

    level_sizes: Tensor
    basis: Tensor

    def __init__(self, *, levels: Sequence[int], groups: int) -> None:
        levels = tuple(levels)
        if not levels or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in levels):
            raise ValueError(f"levels must be whole numbers of at least 2, one per channel, got {list(levels)}.")
        if max(levels) > LARGEST_LEVEL:
            raise ValueError(
                f"levels={max(levels)} for one channel: float32 codes tell at most 2^22 levels apart. "
                f"Spread them over several channels, e.g. two of {math.isqrt(max(levels) - 1) + 1}."
            )
        size = math.prod(levels)
        if size > 2**63:
            raise ValueError(
                f"levels {list(levels)} give {float(size):.3g} ids and an int64 id holds at most 2^63. "
                f"Give fewer levels and groups > 1: every group of channels has an id of its own."
            )
        super().__init__(len(levels) * require_positive("groups", groups), (size,) * groups)
        self.levels = levels
        self.groups = groups
        basis = [math.prod(levels[:k]) for k in range(len(levels))]
        self.register_buffer("level_sizes", torch.tensor(levels * groups), persistent=False)  # (D,)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)  # (K,)

    def bound(self, z: Tensor) -> Tensor:
        """Features squashed to the range of the grid, before rounding, (..., D) float32."""
        raise NotImplementedError

    def level(self, bounded: Tensor) -> Tensor:
        """Bounded features to level numbers 0 .. L - 1, as floats."""
        raise NotImplementedError

    def value(self, level: Tensor) -> Tensor:
        """Level numbers, any dtype, to code values."""
        raise NotImplementedError

    def unvalue(self, codes: Tensor) -> Tensor:
        """Code values to the nearest level numbers, as floats."""
        raise NotImplementedError

    def slope(self, bounded: Tensor) -> Tensor:
        """Bounded features in the scale of the codes: what the straight-through gradient passes through."""
        raise NotImplementedError

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        bounded = self.bound(z)
        level = self.level(bounded.detach())
        codes = straight_through(self.slope(bounded), self.value(level))
        return self.result(codes, self._pack(level), {})

    def _pack(self, level: Tensor) -> Tensor:
        whole = level.nan_to_num(0.0).long()  # features that are not a number get ids all the same, level 0
        digits: Tensor = whole if self.groups == 1 else whole.unflatten(-1, (self.groups, -1))
        return (digits * self.basis).sum(-1)

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes by integer division: int64 (B, N), or (B, N, G) with groups -> (B, N, D) float32.

        Raises:
            ValueError: Wrong number of groups, or an id outside the vocabulary.
        """
        digits = self.grouped(self.check_ids(ids)).unsqueeze(-1) // self.basis
        return self.value((digits.flatten(-2) % self.level_sizes).float())

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids of the nearest grid points: (B, N, D) -> int64 (B, N), or (B, N, G) with groups.

        Raises:
            ValueError: Wrong number of channels.
        """
        level = self.unvalue(self.check_codes(codes)).clamp_min(0)
        return self._pack(torch.minimum(level, (self.level_sizes - 1).float()))


@register("quantizer", "fsq")
class FSQ(_MixedRadix):
    """Finite scalar quantisation as published (Mentzer et al. 2023, arXiv 2309.15505, eq. 1 and appendix code).

    Channel k has L_k levels: b = tanh(z + s) h - o with h = (L - 1)(1 + 1e-3) / 2, o = 1/2 for even L and 0 for odd,
    s = atanh(o / h); code = round-half-even(b) / floor(L / 2), with the gradient of b / floor(L / 2). Codes of an even
    L run from -1 to 1 - 2/L. id = sum_k level_k prod_{j<k} L_j: the first channel is the least significant, in
    integer arithmetic (official code sums in floating point). No learnt state, no loss.

    Two levels are possible but next to useless here, their threshold lies at z = -3.8: use `fsq_symmetric`.

    Args:
        levels: Levels per channel. Usual: 2^8 [8, 6, 5]; 2^10 [8, 5, 5, 5]; 2^12 [7, 5, 5, 5, 5]; 2^14
            [8, 8, 8, 6, 5]; 64,000 [8, 8, 8, 5, 5, 5] (FlexTok, Cosmos); 2^18 [8, 8, 8, 8, 8, 8].
        groups: Tokens of several ids: channels split group by group, dim = groups * len(levels).

    Example:
        >>> import torch, vistok
        >>> vistok.create("quantizer", "fsq", levels=[8, 8, 8, 8]).vocab_sizes
        (4096,)
    """

    reach: Tensor
    offset: Tensor
    shift: Tensor
    width: Tensor

    def __init__(self, *, levels: Sequence[int], groups: int = 1) -> None:
        super().__init__(levels=levels, groups=groups)
        sizes = self.level_sizes.float()
        self.register_buffer("reach", (sizes - 1) * (1 + 1e-3) / 2, persistent=False)
        self.register_buffer("offset", torch.where(self.level_sizes % 2 == 0, 0.5, 0.0), persistent=False)
        self.register_buffer("shift", (self.offset / self.reach).atanh(), persistent=False)
        self.register_buffer("width", (self.level_sizes // 2).float(), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Tanh(z + s) h - o, (..., D)."""
        return (z + self.shift).tanh() * self.reach - self.offset

    def level(self, bounded: Tensor) -> Tensor:
        """Round half to even, counted from 0."""
        return bounded.round() + self.width

    def value(self, level: Tensor) -> Tensor:
        """(level - floor(L / 2)) / floor(L / 2)."""
        return (level - self.width) / self.width

    def unvalue(self, codes: Tensor) -> Tensor:
        """Nearest levels of codes."""
        return (codes * self.width).round() + self.width

    def slope(self, bounded: Tensor) -> Tensor:
        """Bounded / floor(L / 2)."""
        return bounded / self.width


@register("quantizer", "fsq_symmetric")
class SymmetricFSQ(_MixedRadix):
    """FSQ with levels placed symmetrically in [-1, 1], ends included, for every L (also L = 2).

    code = 2 floor((L - 1)(tanh z + 1) / 2 + 1/2) / (L - 1) - 1 (vector-quantize-pytorch's `preserve_symmetry`;
    Stable Audio's dithered FSQ); gradient that of tanh z. Ids as in `fsq`.

    Args:
        levels: Levels per channel.
        groups: Tokens of several ids: channels split group by group, dim = groups * len(levels).
    """

    steps: Tensor

    def __init__(self, *, levels: Sequence[int], groups: int = 1) -> None:
        super().__init__(levels=levels, groups=groups)
        self.register_buffer("steps", (self.level_sizes - 1).float(), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Tanh z, (..., D)."""
        return z.tanh()

    def level(self, bounded: Tensor) -> Tensor:
        """Round half up, counted from 0."""
        return (self.steps * (bounded + 1) / 2 + 0.5).floor()

    def value(self, level: Tensor) -> Tensor:
        """2 level / (L - 1) - 1."""
        return 2 * level / self.steps - 1

    def unvalue(self, codes: Tensor) -> Tensor:
        """Nearest levels of codes."""
        return ((codes + 1) / 2 * self.steps).round()

    def slope(self, bounded: Tensor) -> Tensor:
        """Tanh z itself."""
        return bounded
