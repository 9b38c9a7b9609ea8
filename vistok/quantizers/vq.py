"""Vector quantisation with a codebook learnt by gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.quantizers.base import Positions, Quantized, Quantizer, require_positive, straight_through
from vistok.quantizers.entropy import softmax_entropies
from vistok.quantizers.search import find_rows, nearest, sample_nearby
from vistok.registry import register

Gradient = Literal["straight_through", "rotation"]


def rotate_to(z: Tensor, q: Tensor) -> Tensor:
    """Exactly q in value; the gradient to z is rotated and scaled as z is to become q.

    The rotation trick (Fifty et al. 2024, arXiv 2410.06424, eq. 4): with unit vectors z^, q^ and
    w = (z^ + q^) / |z^ + q^|, all constants, R z = z - 2 w (w.z) + 2 q^ (z^.z). The norm of z^ + q^ is bounded from
    below, so that opposite vectors give no NaN (the GigaTok code divides by zero there).

    Args:
        z: Features, (..., D).
        q: Their codes, (..., D).
    """
    with torch.no_grad():
        z_norm, q_norm = (x.norm(dim=-1, keepdim=True).clamp_min(1e-6) for x in (z, q))
        z_unit, q_unit = z / z_norm, q / q_norm
        w = F.normalize(z_unit + q_unit, dim=-1, eps=1e-6)
        scale = q_norm / z_norm
    rotated = z - 2 * w * (w * z).sum(-1, keepdim=True) + 2 * q_unit * (z_unit * z).sum(-1, keepdim=True)
    rotated = rotated * scale
    exact: Tensor = q.detach() + (rotated - rotated.detach())
    return exact


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight_through": straight_through,
    "rotation": rotate_to,
}


class TableQuantizer(Quantizer):
    """A quantizer whose codes are the rows of one table.

    A subclass gives the table as `codes`; ids are row numbers. `codes_to_ids` finds the equal row, which is the
    exact inverse of `ids_to_codes` as long as no two rows are equal (the first of equal rows is returned).

    Attributes:
        codebook_size: Number of codes, C.
    """

    def __init__(self, *, codebook_size: int, dim: int) -> None:
        super().__init__(dim, (require_positive("codebook_size", codebook_size),))
        self.codebook_size = codebook_size

    @property
    def codes(self) -> Tensor:
        """The table as decoders see it, (C, D) float32."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table, (...) -> (..., D); a subclass overrides it where a row is cheaper than the table."""
        return F.embedding(ids, self.codes)

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Rows of the table: int64 (B, N) in 0 .. C - 1 -> (B, N, D) float32.

        Raises:
            ValueError: An id outside the table.
        """
        return self.rows(self.check_ids(ids))

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Rows equal to the codes, the nearest where there is none: (B, N, D) -> int64 (B, N).

        Raises:
            ValueError: Wrong number of channels.
        """
        codes = self.check_codes(codes)
        with torch.autocast(codes.device.type, enabled=False):
            return find_rows(codes.reshape(-1, self.dim), self.codes).reshape(codes.shape[:-1])


@register("quantizer", "vq")
class VectorQuantizer(TableQuantizer):
    """VQ with a gradient codebook (van den Oord et al. 2017, arXiv 1711.00937, eq. 3).

    id = argmin_c |z - e_c|^2, first index on ties. Loss terms: codebook = mean((e - sg z)^2),
    commitment = mean((sg e - z)^2), over all elements; published weights 1 and 0.25 (TiTok, GigaTok, LlamaGen).
    taming-transformers puts the 0.25 on the codebook term unless told otherwise ("legacy"): we do not.

    With `l2_norm` z and every row are divided by their length first (ViT-VQGAN, LlamaGen, TiTok): distances, losses
    and codes are those of the unit vectors, and gradients pass through both normalisations.

    With non-zero weights for `entropy_sample` / `entropy_batch` the entropies of softmax(-|z - e_c|^2 / T) are added
    (GigaTok: entropy_weight 0.005 to 0.1, T 0.01), computed tile by tile.

    Args:
        codebook_size: Number of codes, C. The table starts uniform in +-1/C.
        dim: Channels of a code.
        l2_norm: Compare and return unit vectors.
        gradient: How the gradient passes the discrete choice: straight_through, or rotation (arXiv 2410.06424).
        commitment_weight: Weight of the commitment term.
        entropy_weight: Weight of (entropy_sample - entropy_batch).
        entropy_temperature: T of the entropies.

    Example:
        >>> import torch, vistok
        >>> q = vistok.create("quantizer", "vq", codebook_size=4096, dim=12, l2_norm=True)
        >>> q(torch.randn(2, 32, 12)).ids.shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        dim: int,
        l2_norm: bool = False,
        gradient: Gradient = "straight_through",
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__(codebook_size=codebook_size, dim=dim)
        self.l2_norm = l2_norm
        self.gradient = gradient
        self.entropy_temperature = entropy_temperature
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.weights = {"codebook": 1.0, "commitment": commitment_weight}
        if entropy_weight:
            self.weights |= {"entropy_sample": entropy_weight, "entropy_batch": -entropy_weight}

    @property
    def codes(self) -> Tensor:
        """The table, normalised with `l2_norm`, (C, D)."""
        return self.normalise(self.embedding.weight.float())

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table, normalised with `l2_norm`, (...) -> (..., D)."""
        return self.normalise(self.embedding(ids).float())

    def normalise(self, x: Tensor) -> Tensor:
        """Unit vectors with `l2_norm` (x / max(|x|, 1e-12)), x itself without."""
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def choose(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Ids of (normalised) features, (B, N, D) -> (B, N)."""
        return nearest(z.reshape(-1, self.dim), self.codes)[0].reshape(z.shape[:-1])

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        z = self.normalise(z)
        ids = self.choose(z, generator)
        q = self.rows(ids)
        losses = {
            "codebook": positions.mean((q - z.detach()).square()),
            "commitment": positions.mean((q.detach() - z).square()),
        }
        if self.weights.get("entropy_sample") or self.weights.get("entropy_batch"):
            losses |= self._entropies(z, positions)
        return self.result(ESTIMATORS[self.gradient](z, q), ids, losses)

    def _entropies(self, z: Tensor, positions: Positions) -> dict[str, Tensor]:
        table = self.codes
        scale = 1 / self.entropy_temperature
        # -|z - e|^2 without |z|^2, which the softmax does not see
        return softmax_entropies(z, table, positions, scale=2 * scale, bias=-scale * table.square().sum(-1))


@register("quantizer", "vq_stochastic")
class StochasticVectorQuantizer(VectorQuantizer):
    """VQ that draws its ids while training: id ~ softmax(z.e / T) on unit vectors (LARP; option of GigaTok, T 0.03).

    In evaluation mode the nearest code is taken. Losses and weights are those of `vq` with `l2_norm`. The rotation
    trick is not offered: together with sampling it diverges (reported for vector-quantize-pytorch).

    Args:
        codebook_size: Number of codes.
        dim: Channels of a code.
        temperature: T; draws come from `forward`'s generator.
        commitment_weight: Weight of the commitment term.
    """

    def __init__(
        self, *, codebook_size: int, dim: int, temperature: float = 0.03, commitment_weight: float = 0.25
    ) -> None:
        super().__init__(codebook_size=codebook_size, dim=dim, l2_norm=True, commitment_weight=commitment_weight)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}. For the nearest code use 'vq'.")
        self.temperature = temperature

    def choose(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Ids of unit features: drawn in training, nearest in evaluation, (B, N, D) -> (B, N)."""
        if not self.training:
            return super().choose(z, generator)
        flat = z.detach().reshape(-1, self.dim)
        return sample_nearby(flat, self.codes.detach(), self.temperature, generator).reshape(z.shape[:-1])
