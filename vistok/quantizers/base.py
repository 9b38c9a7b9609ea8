"""What every quantizer is and returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOSS_TERMS = ("codebook", "commitment", "entropy_sample", "entropy_batch", "saturation", "kl")


@dataclass(frozen=True)
class Quantized:
    """Result of a quantizer.

    Attributes:
        codes: Quantised vectors with a straight-through gradient, float32, (B, N, D).
        ids: Token ids, int64, (B, N) or (B, N, G) for grouped codes; None for continuous latents.
        losses: Scalar loss terms, unweighted, under the names in `LOSS_TERMS`.
        stats: Detached figures worth logging.
        loss: Sum of the terms under the quantizer's `weights`, a scalar (0 if it has none).
    """

    codes: Tensor
    ids: Tensor | None
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    loss: Tensor


class Quantizer(nn.Module):
    """Base of all quantizers: float32 inside, channels last, one result type.

    A subclass sets the attributes below in its constructor and implements `quantize`, `ids_to_codes` and
    `codes_to_ids`.

    Attributes:
        dim: Channels of the codes, D.
        in_dim: Channels of the features it takes; `dim` unless said otherwise (2 * dim for a Gaussian).
        vocab_sizes: Number of ids per group, () for continuous latents.
        weights: Weight of each loss term in `Quantized.loss`; the published defaults. A step may set them.
    """

    def __init__(self, dim: int, vocab_sizes: tuple[int, ...], *, in_dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.in_dim = dim if in_dim is None else in_dim
        self.vocab_sizes = vocab_sizes
        self.weights: dict[str, float] = {}

    @property
    def bits(self) -> float:
        """Bits per token, the sum of log2 of the group vocabularies."""
        return float(sum(math.log2(v) for v in self.vocab_sizes))

    def num_ids(self, n: int, grid: tuple[int, int] | None = None) -> int:
        """Ids that `n` feature positions become (differs from `n` only for multi-scale quantizers)."""
        return n

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """Quantise features; float32 with autocast off whatever comes in.

        Args:
            z: Features, (B, N, in_dim), any floating dtype.
            mask: True where a position counts, (B, N); masked positions vote for no loss and no statistic.
            grid: (h, w) with h * w = N, used by multi-scale quantizers only.
            generator: Source of every random draw.

        Raises:
            ValueError: Wrong rank or channel count.
        """
        if z.ndim != 3 or z.shape[-1] != self.in_dim:
            raise ValueError(
                f"{type(self).__name__} takes features (B, N, {self.in_dim}) and got {tuple(z.shape)}. "
                f"Channels are last; set the quantizer's dim to the width of the encoder's output."
            )
        with torch.autocast(z.device.type, enabled=False):
            return self.quantize(z.float(), mask, grid, generator)

    def quantize(
        self,
        z: Tensor,
        mask: Tensor | None,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """The algorithm itself, on float32 features. See `forward`."""
        raise NotImplementedError

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes of ids: (B, N) or (B, N, G) int64 -> (B, N, D) float32."""
        raise NotImplementedError

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids of codes, exact inverse of `ids_to_codes`: (B, N, D) -> int64 (B, N) or (B, N, G)."""
        raise NotImplementedError

    def weighted(self, losses: dict[str, Tensor], z: Tensor) -> Tensor:
        """Sum of the loss terms under `weights`; a zero on z's device if there are none."""
        total = z.new_zeros(())
        for name, term in losses.items():
            weight = self.weights.get(name, 0.0)
            if weight:
                total = total + weight * term
        return total


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x (B, N) or (B, N, D) over the positions where mask (B, N) is True (over all if None)."""
    if mask is None:
        return x.mean()
    weight = mask.to(x.dtype)
    if x.ndim == 3:
        return (x * weight.unsqueeze(-1)).sum() / (weight.sum().clamp_min(1) * x.shape[-1])
    return (x * weight).sum() / weight.sum().clamp_min(1)
