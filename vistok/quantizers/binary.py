"""Binary latents: bits drawn from Bernoulli distributions, with a vector per bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.quantizers.base import MAX_ID_BITS, Positions, Quantized, Quantizer, require_positive, straight_through
from vistok.quantizers.bits import bits_to_groups, groups_to_bits
from vistok.quantizers.subset import subset_bits
from vistok.quantizers.usage import UsageTracker
from vistok.registry import register


@register("quantizer", "binary")
class BinaryLatent(Quantizer):
    """Bernoulli binary latents (Wang et al. 2023, arXiv 2304.04820; Instella-T2I, arXiv 2506.21022).

    a = Linear(z), p = sigma(a). Training: bit ~ Bernoulli(sigma(a / train_temperature)); evaluation: bit = [p > 0.5].
    f = sg(bit) + p - sg(p), p at temperature one; code = f @ embed, so a 0 bit contributes nothing. Loss term
    saturation = mean(p (1 - p)). Its published weight is unknown (the training script was never released): 0.01 is
    ours, found on a toy run, where 1 lets bits freeze before they carry anything.

    Ids: up to 63 bits one id, above that bytes, G = num_bits / 8 groups of 256; bit k of a token is bit k mod 8 of
    group k // 8, the least significant first ("little").

    Args:
        dim: Channels of a code.
        num_bits: Bits per token; above 63 a multiple of 8.
        in_dim: Channels of the features; `dim` if None.
        train_temperature: Temperature of the draw in training (published config 0.1).
        saturation_weight: Weight of the saturation term.

    Example:
        >>> import torch, vistok
        >>> q = vistok.create("quantizer", "binary", dim=96, num_bits=64)
        >>> q(torch.randn(2, 128, 96)).ids.shape
        torch.Size([2, 128, 8])
    """

    def __init__(
        self,
        *,
        dim: int,
        num_bits: int,
        in_dim: int | None = None,
        train_temperature: float = 0.1,
        saturation_weight: float = 0.01,
    ) -> None:
        require_positive("num_bits", num_bits)
        if num_bits > MAX_ID_BITS and num_bits % 8:
            raise ValueError(f"num_bits={num_bits}: above {MAX_ID_BITS} bits ids are bytes, so give a multiple of 8.")
        if train_temperature <= 0:
            raise ValueError(f"train_temperature must be positive, got {train_temperature}; published is 0.1.")
        groups = 1 if num_bits <= MAX_ID_BITS else num_bits // 8
        super().__init__(dim, (2 ** (num_bits // groups),) * groups, in_dim=in_dim)
        self.usage = UsageTracker(self.vocab_sizes, bitwise=True)
        self.num_bits = num_bits
        self.groups = groups
        self.train_temperature = train_temperature
        self.proj = nn.Linear(self.in_dim, num_bits)
        self.embed = nn.Parameter(torch.randn(num_bits, dim) * 0.02)
        self.weights = {"saturation": saturation_weight}

    def logits(self, z: Tensor) -> Tensor:
        """Logits of the bits, (B, N, in_dim) -> (B, N, bits) float32."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z.float(), self.proj.weight.float(), self.proj.bias.float())

    def decide(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Bits of logits, bool (B, N, bits).

        Args:
            logits: (B, N, bits).
            uniform: Uniform numbers in [0, 1): bit = u < sigma(a / train_temperature). None: bit = [sigma(a) > 0.5].
        """
        if uniform is None:
            return torch.sigmoid(logits) > 0.5
        return uniform < torch.sigmoid(logits / self.train_temperature)

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        uniform = None
        if self.training:
            uniform = torch.rand((*z.shape[:2], self.num_bits), generator=generator, device=z.device)
        return self.from_uniform(z, positions, uniform)

    def from_uniform(self, z: Tensor, positions: Positions, uniform: Tensor | None) -> Quantized:
        """Quantise with given uniform numbers (B, N, bits), or None for thresholding."""
        logits = self.logits(z)
        bits = self.decide(logits, uniform)
        p = torch.sigmoid(logits)
        codes = straight_through(p, bits.to(p.dtype)) @ self.embed.float()
        return self.result(codes, self._pack(bits), {"saturation": positions.mean(p * (1 - p))})

    def _pack(self, bits: Tensor) -> Tensor:
        return self.ungrouped(bits_to_groups(bits, self.groups))

    def ids_to_bits(self, ids: Tensor) -> Tensor:
        """Bits of ids: int64 (B, N), or (B, N, G) above 63 bits -> bool (B, N, bits).

        Raises:
            ValueError: Wrong number of groups, or an id outside the vocabulary.
        """
        return groups_to_bits(self.grouped(self.check_ids(ids)), self.num_bits // self.groups)

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Sums of the vectors of the set bits: int64 (B, N), or (B, N, G) above 63 bits -> (B, N, D) float32.

        Raises:
            ValueError: Wrong number of groups, or an id outside the vocabulary.
        """
        with torch.autocast(ids.device.type, enabled=False):
            return self.ids_to_bits(ids).float() @ self.embed.float()

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids whose vectors sum to the codes: (B, N, D) -> int64 (B, N), or (B, N, G) above 63 bits.

        With more bits than channels the bits beyond the vectors' rank are tried, up to 16 of them.

        Raises:
            ValueError: Wrong number of channels; too many bits to try; codes that are no such sum, or more than one.
        """
        codes = self.check_codes(codes)
        bits = subset_bits(codes.reshape(-1, self.dim), self.embed.detach().float())
        return self._pack(bits.reshape(*codes.shape[:-1], self.num_bits))
