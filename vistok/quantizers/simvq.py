"""SimVQ: a frozen table under one learnt linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.quantizers.base import Positions, Quantized, require_positive
from vistok.quantizers.search import nearest
from vistok.quantizers.vq import ESTIMATORS, Gradient, TableQuantizer
from vistok.registry import register


@register("quantizer", "simvq")
class SimVQ(TableQuantizer):
    """Codes e_c = W f_c with frozen f and learnt W (Zhu et al. 2024, arXiv 2411.02038, eq. 6).

    id = argmin |z - W f_c|^2. Only W learns, so all codes move together and none dies. Terms codebook =
    mean((q - sg z)^2), commitment = mean((sg q - z)^2), weights 1 and 0.25 (vector-quantize-pytorch; the official
    code puts 0.25 on the codebook term unless legacy is off, and its decoding returns f instead of W f: we do not).

    Args:
        codebook_size: Number of codes.
        dim: Channels of a code.
        frozen_dim: Channels of the frozen table; `dim` if None. Rows are N(0, frozen_dim^(-1/2)).
        bias: Learn a bias too (official code) or not (vector-quantize-pytorch).
        gradient: How the gradient passes the discrete choice; rotation was reported to let the commitment explode.
        commitment_weight: Weight of the commitment term.
    """

    frozen: Tensor

    def __init__(
        self,
        *,
        codebook_size: int,
        dim: int,
        frozen_dim: int | None = None,
        bias: bool = False,
        gradient: Gradient = "straight_through",
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__(codebook_size=codebook_size, dim=dim)
        inner = dim if frozen_dim is None else require_positive("frozen_dim", frozen_dim)
        self.gradient = gradient
        self.register_buffer("frozen", torch.randn(codebook_size, inner) * inner**-0.5)
        self.projection = nn.Linear(inner, dim, bias=bias)
        self.weights = {"codebook": 1.0, "commitment": commitment_weight}

    @property
    def codes(self) -> Tensor:
        """The projected table, (C, D)."""
        return self._project(self.frozen)

    def rows(self, ids: Tensor) -> Tensor:
        """Projected rows, (...) -> (..., D): only the rows asked for are projected."""
        return self._project(F.embedding(ids, self.frozen))

    def _project(self, rows: Tensor) -> Tensor:
        bias = self.projection.bias
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.float(), self.projection.weight.float(), None if bias is None else bias.float())

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        with torch.no_grad():
            ids = nearest(z.reshape(-1, self.dim), self.codes)[0].reshape(z.shape[:-1])
        q = self.rows(ids)
        losses = {
            "codebook": positions.mean((q - z.detach()).square()),
            "commitment": positions.mean((q.detach() - z).square()),
        }
        return self.result(ESTIMATORS[self.gradient](z, q), ids, losses)
