"""Index backpropagation quantisation: every code learns from every token, through the softmax over the table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vistok.quantizers.base import Positions, Quantized
from vistok.quantizers.entropy import Logits, softmax_backward, softmax_entropies
from vistok.quantizers.vq import TableQuantizer
from vistok.registry import register


class _IndexGradient(torch.autograd.Function):
    """Zeros (N, D) whose gradient is that of softmax(z E^T) E through the softmax alone, tiles recomputed."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, table: Tensor, normaliser: Tensor) -> Tensor:
        ctx.save_for_backward(z, table, normaliser)
        return torch.zeros_like(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, table, normaliser = ctx.saved_tensors

        def cotangent(log_q: Tensor, rows: slice, cols: slice) -> Tensor:
            product: Tensor = grad[rows] @ table[cols].T
            return product

        d_z, d_table, _ = softmax_backward(Logits(z, table), normaliser, cotangent)
        return d_z, d_table, None


@register("quantizer", "ibq")
class IBQ(TableQuantizer):
    """Index backpropagation (Shi et al. 2024, arXiv 2412.02692, eq. 4-8).

    Logits l = z.e_c, p = softmax(l), h = one-hot arg max, o = h - sg p + p; code = o E. Terms: index =
    mean((o E - z)^2) with gradient into z and all codes; commitment = mean((sg h E - z)^2); codebook =
    mean((h E - sg z)^2); published weights 1, 1, 0.25. Entropies of softmax(l / T), T 0.01, weight 0.05 (computed
    while either weight is not zero).

    No (tokens x codes) tensor beyond a tile, forward and backward; official code holds several.

    Args:
        codebook_size: Number of codes, C. The table starts as N(0, 1).
        dim: Channels of a code (published 256).
        beta: Weight of the codebook term.
        entropy_weight: Weight of (entropy_sample - entropy_batch).
        entropy_temperature: T.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        dim: int,
        beta: float = 0.25,
        entropy_weight: float = 0.05,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__(codebook_size=codebook_size, dim=dim)
        if entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature must be positive, got {entropy_temperature}; published is 0.01.")
        self.entropy_temperature = entropy_temperature
        self.embedding = nn.Embedding(codebook_size, dim)
        self.weights = {"index": 1.0, "commitment": 1.0, "codebook": beta}
        if entropy_weight:
            self.weights |= {"entropy_sample": entropy_weight, "entropy_batch": -entropy_weight}

    @property
    def codes(self) -> Tensor:
        """The table, (C, D)."""
        return self.embedding.weight.float()

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        table, flat = self.codes, z.reshape(-1, self.dim)
        index, normaliser = Logits(flat.detach(), table.detach()).best()
        ids = index.reshape(z.shape[:-1])
        q = F.embedding(ids, table)
        codes = q + _IndexGradient.apply(flat, table, normaliser).reshape(z.shape)
        losses = {
            "index": positions.mean((codes - z).square()),
            "commitment": positions.mean((q.detach() - z).square()),
            "codebook": positions.mean((q - z.detach()).square()),
        }
        if self.weights.get("entropy_sample") or self.weights.get("entropy_batch"):
            losses |= softmax_entropies(z, table, positions, scale=1 / self.entropy_temperature)
        return self.result(codes, ids, losses)
