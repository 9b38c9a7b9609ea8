"""Ternary digits: -1, 0 or +1 per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.quantizers.base import Positions, Quantized, Quantizer, straight_through
from vistok.registry import register

MOST_DIGITS = 39  # 3^39 < 2^63


@register("quantizer", "ternary")
class Ternary(Quantizer):
    """Each channel rounded to -1, 0 or +1, the digits of a group joined to one id.

    The digit is round(clamp(z, -1, 1)) with halves towards zero; its gradient is that of the clamp. An id is
    sum_j (digit_j + 1) 3^j over the channels of its group, channel 0 least significant. Zero is a digit as good as
    any, which makes codes of "nothing here" cheap for an entropy coder: the reason to prefer it to single bits.

    Args:
        dim: Channels, D.
        groups: Ids per token; every group has dim / groups digits, at most 39.

    Raises:
        ValueError: Groups that do not divide the channels, or more digits than an id holds.
    """

    powers: Tensor

    def __init__(self, *, dim: int, groups: int = 1) -> None:
        if groups < 1 or dim < 1 or dim % groups or dim // groups > MOST_DIGITS:
            raise ValueError(
                f"ternary: groups={groups} must divide dim={dim} into groups of at most {MOST_DIGITS} digits "
                f"(an int64 id holds no more)."
            )
        self.digits = dim // groups
        super().__init__(dim, (3**self.digits,) * groups)
        self.register_buffer("powers", 3 ** torch.arange(self.digits), persistent=False)

    def quantize(
        self, z: Tensor, positions: Positions, grid: tuple[int, int] | None, generator: torch.Generator | None
    ) -> Quantized:
        """See `Quantizer.forward`."""
        bounded = z.clamp(-1, 1)
        codes = straight_through(bounded, torch.round(bounded))  # torch rounds halves to even, here to 0
        return self.result(codes, self.codes_to_ids(codes.detach()), {})

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """See `Quantizer.ids_to_codes`."""
        groups = self.grouped(self.check_ids(ids))  # (B, N, G)
        digits = groups.unsqueeze(-1) // self.powers % 3 - 1  # (B, N, G, D / G)
        return digits.flatten(-2).float()

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """See `Quantizer.codes_to_ids`."""
        digits = self.check_codes(codes).round().clamp(-1, 1).long() + 1
        ids = (digits.unflatten(-1, (-1, self.digits)) * self.powers).sum(-1)  # (B, N, G)
        return self.ungrouped(ids)
