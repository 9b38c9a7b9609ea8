"""Binary spherical quantisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.quantizers.base import Positions, Quantized
from vistok.quantizers.bits import BitOrder
from vistok.quantizers.entropy import bit_entropy, bits_entropies, global_mean
from vistok.quantizers.lfq import SignQuantizer, require_distribution
from vistok.registry import register

EPS = 1e-8


@register("quantizer", "bsq")
class BSQ(SignQuantizer):
    """Signs on the unit sphere (Zhao et al. 2024, arXiv 2406.07548, eq. 4-13).

    u = z / |z|, code = sign(u) / sqrt(d), with gradient d^(-1/2) to u (released code scales after the
    straight-through step). The probability of +1 is sigma(4 u tau / sqrt(d)). Loss terms: entropy_sample = mean over
    tokens of the summed bit entropies; entropy_batch = sum over groups of the entropy of the mean pattern
    distribution, for `entropy_group` = 1 that of independent bits (the paper's approximation, an upper bound);
    commitment = mean over tokens of sum_d (code - u)^2 (a sum over channels, as released). Published weights: 0.1 each
    for the entropies (x3 in the first 2000 steps, a schedule of the step), commitment 0; divided by tau.

    The total is negative while codes are in even use. Ids are integers throughout; released code sums them in
    floating point, wrong from 25 bits on.

    Args:
        dim: Channels, i.e. bits per token.
        groups: Ids per token; 1 up to 63 bits, e.g. dim / 8 (bytes) beyond.
        entropy_group: Bits whose joint distribution the batch entropy uses, at most 22; 1 is "analytical".
        l2_norm: Project to the unit sphere; without it u = z and codes are +-1.
        inv_temperature: tau.
        bit_order: Which end of its id a group's channel 0 is; big in BSQ-ViT.
        entropy_weight: Weight of (entropy_sample - entropy_batch), before 1 / tau.
        commitment_weight: Weight of the commitment term.
    """

    def __init__(
        self,
        *,
        dim: int,
        groups: int = 1,
        entropy_group: int = 1,
        l2_norm: bool = True,
        inv_temperature: float = 1.0,
        bit_order: BitOrder = "big",
        entropy_weight: float = 0.1,
        commitment_weight: float = 0.0,
    ) -> None:
        super().__init__(dim=dim, groups=groups, bit_order=bit_order, magnitude=dim**-0.5 if l2_norm else 1.0)
        if entropy_group < 1 or dim % entropy_group:
            raise ValueError(
                f"entropy_group={entropy_group} does not divide dim={dim}. Choose a divisor of it, or 1 for "
                f"independent bits."
            )
        require_distribution("bsq", entropy_group, dim)
        if inv_temperature <= 0:
            raise ValueError(f"inv_temperature must be positive, got {inv_temperature}; published is 1.")
        self.entropy_group = entropy_group
        self.l2_norm = l2_norm
        self.inv_temperature = inv_temperature
        self.weights = {
            "entropy_sample": entropy_weight / inv_temperature,
            "entropy_batch": -entropy_weight / inv_temperature,
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
        u = F.normalize(z, dim=-1) if self.l2_norm else z
        q = self.signs(z)
        codes = q + (u - u.detach()) * self.magnitude
        losses = self._entropies(u * (4 * self.inv_temperature * self.magnitude), positions)
        losses["commitment"] = positions.mean((q - u).square().sum(-1))
        return self.result(codes, self.sign_ids(z), losses)

    def _entropies(self, logit: Tensor, positions: Positions) -> dict[str, Tensor]:
        if self.entropy_group > 1:
            parts = self.dim // self.entropy_group
            found = bits_entropies(logit.unflatten(-1, (parts, -1)), positions, pooled=False, eps=EPS)
            return {name: term * parts for name, term in found.items()}
        share = global_mean(positions.select(torch.sigmoid(logit)).sum((0, 1)), positions)
        off = 1 - share
        return {
            "entropy_sample": positions.mean(bit_entropy(logit).sum(-1)),
            "entropy_batch": -(share * (share + EPS).log() + off * (off + EPS).log()).sum(),
        }
