"""Clustering VQ: a gradient codebook whose unused codes move to features of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.distributed import all_stack, all_sum, rank
from vistok.quantizers.base import Positions, Quantized
from vistok.quantizers.ema import finite_rows
from vistok.quantizers.search import nearest
from vistok.quantizers.vq import VectorQuantizer
from vistok.registry import register


@register("quantizer", "cvq")
class ClusteringVectorQuantizer(VectorQuantizer):
    """CVQ-VAE, closest-sample variant, as TA-TiTok trains it (Zheng and Vedaldi 2023, arXiv 2307.15139, eq. 4-6).

    As `vq`, and in training mode, after the losses are formed: usage p <- 0.99 p + 0.01 (share of the ids);
    a = exp(-10 p C / (1 - 0.99) - 1e-3); e <- (1 - a) e + a f, where f is the feature nearest to the code. Unused
    codes jump to their nearest feature, codes in even use stay. Ids, nearest features and p are those of all
    processes. With `l2_norm` distances are between unit vectors and the copied feature is not normalised, as in the
    official code. State: the codebook and the buffer `embed_prob` (C,).

    Args:
        codebook_size: Number of codes, C.
        dim: Channels of a code.
        l2_norm: Compare and return unit vectors.
        commitment_weight: Weight of the commitment term.
        decay: Decay of the usage p.
    """

    embed_prob: Tensor

    def __init__(
        self,
        *,
        codebook_size: int,
        dim: int,
        l2_norm: bool = False,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
    ) -> None:
        super().__init__(codebook_size=codebook_size, dim=dim, l2_norm=l2_norm, commitment_weight=commitment_weight)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}.")
        self.decay = decay
        self.register_buffer("embed_prob", torch.zeros(codebook_size))

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        out = super().quantize(z, positions, grid, generator)
        if self.training and out.ids is not None:
            self._revive(z.detach(), out.ids, positions)
        return out

    @torch.no_grad()
    def _revive(self, z: Tensor, ids: Tensor, positions: Positions) -> None:
        tokens = z.reshape(-1, self.dim)
        counted = finite_rows(tokens, positions.flat())
        histogram = all_sum(tokens.new_zeros(self.codebook_size).index_add_(0, ids.reshape(-1), counted.float()))
        total = histogram.sum()
        feature = self._nearest_features(tokens, counted)
        prob = torch.lerp(histogram / total.clamp_min(1), self.embed_prob.float(), self.decay)
        pull = torch.exp(-prob * self.codebook_size * 10 / (1 - self.decay) - 1e-3).unsqueeze(-1)
        weight = self.embedding.weight
        seen = total > 0  # a batch of padding alone changes nothing
        self.embed_prob.copy_(torch.where(seen, prob, self.embed_prob))
        weight.data.copy_(torch.where(seen, (1 - pull) * weight + pull * feature, weight))

    def _nearest_features(self, z: Tensor, counted: Tensor) -> Tensor:
        """The feature nearest to each code over all processes, (C, D); zeros where no position counts."""
        # no branch on the data: features that do not count move out of reach
        table, compared = self.codes, torch.where(counted.unsqueeze(-1), self.normalise(z), 1e6)
        if not len(z):
            compared, z = table.new_full((1, self.dim), 1e6), table.new_zeros(1, self.dim)
        at, distance = nearest(table, compared)
        owner = all_stack(distance).argmin(0)  # (C,): the first process of equals
        own = torch.where((owner == rank()).unsqueeze(-1), z[at], 0.0)
        return all_sum(own)
