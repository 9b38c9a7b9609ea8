"""Continuous latents with a KL term."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.quantizers.base import Positions, Quantized, Quantizer
from vistok.registry import register


@register("quantizer", "gaussian")
class GaussianLatent(Quantizer):
    """Diagonal Gaussian latents (Kingma and Welling 2014; TiTok, MAR and Stable Diffusion "KL" latents).

    Features are [mean | logvar] on channels, `in_dim` = 2 * dim; logvar is clamped to [-30, 20];
    std = exp(logvar / 2). There are no ids. Loss term kl = 0.5 sum(mean^2 + var - 1 - logvar) over channels and
    positions, mean over the batch; published weight 1e-6 (TiTok).

    What `forward` returns as codes is decided by `sample`: None (default) draws in training mode and gives the mean
    in evaluation mode; True and False always draw or never. `mode(z)` and `draw(z, generator)` are the two explicitly,
    whatever the mode, and `moments(z)` the parameters of the distribution.

    Args:
        dim: Channels of the latent.
        sample: Draw always (True), never (False), or in training mode only (None). An attribute: may be set later.
        kl_weight: Weight of the KL term.

    Example:
        >>> import torch, vistok
        >>> q = vistok.create("quantizer", "gaussian", dim=16)
        >>> q(torch.randn(2, 64, 32)).codes.shape
        torch.Size([2, 64, 16])
    """

    def __init__(self, *, dim: int, sample: bool | None = None, kl_weight: float = 1e-6) -> None:
        super().__init__(dim, (), in_dim=2 * dim)
        self.sample = sample
        self.weights = {"kl": kl_weight}

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clamped log-variance of features (B, N, 2 D), float32, (B, N, D) each."""
        mean, logvar = z.float().chunk(2, dim=-1)
        return mean, logvar.clamp(-30.0, 20.0)

    def mode(self, z: Tensor) -> Tensor:
        """The mean, (B, N, 2 D) -> (B, N, D)."""
        return self.moments(z)[0]

    def draw(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One sample, mean + std * noise with reparameterised gradient, (B, N, 2 D) -> (B, N, D)."""
        mean, logvar = self.moments(z)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + torch.exp(0.5 * logvar) * noise

    def kl(self, z: Tensor) -> Tensor:
        """KL divergence to N(0, 1) of each position, summed over channels, (B, N, 2 D) -> (B, N)."""
        mean, logvar = self.moments(z)
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        sampled = self.training if self.sample is None else self.sample
        codes = self.draw(z, generator) if sampled else self.mode(z)
        return self.result(codes, None, {"kl": positions.per_sample(self.kl(z))})

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Not possible.

        Raises:
            ValueError: Always.
        """
        raise ValueError("Gaussian latents are continuous and have no ids. Decode codes, or use a discrete quantizer.")

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Not possible.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Gaussian latents are continuous and have no ids. Keep the codes, or use a discrete quantizer."
        )
