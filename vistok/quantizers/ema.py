"""Vector quantisation whose codebook follows the features by exponential moving averages."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.distributed import all_stack, all_sum, from_first, rank
from vistok.quantizers.base import Positions, Quantized
from vistok.quantizers.search import nearest
from vistok.quantizers.vq import ESTIMATORS, Gradient, TableQuantizer
from vistok.registry import register


def finite_rows(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens (N, D) vote: those of the mask without inf and NaN, bool (N,).

    The loss of a failed step is skipped by the training loop; its features must not stay in a running average.
    """
    finite = torch.isfinite(tokens).all(-1)
    return finite if mask is None else finite & mask


@torch.no_grad()
def draw_tokens(tokens: Tensor, mask: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Random tokens of all processes, the same on every process: (N, D) -> (count, D).

    Positions are stratified and shuffled, so no token comes twice if there are at least `count`. Process 0 draws and
    broadcasts; each process contributes its own rows to a sum. Zeros if no token counts anywhere.

    Args:
        tokens: This process' tokens, (N, D); N may differ between processes.
        mask: True where a token counts, (N,).
        count: Tokens wanted.
        generator: Source of the draw.
    """
    device = tokens.device
    counts = all_stack(mask.sum())  # (P,)
    order = torch.randperm(count, generator=generator, device=device)
    jitter = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    share = from_first((order + jitter) / count)
    place = torch.minimum((share * counts.sum()).long(), counts.sum() - 1)  # among the valid tokens of all processes
    place = place - counts[: rank()].sum()
    own = (place >= 0) & (place < counts[rank()])
    if not len(tokens):
        return all_sum(tokens.new_zeros(count, tokens.shape[1]))
    at = torch.searchsorted(mask.cumsum(0), place.clamp(0, len(tokens) - 1) + 1).clamp_max(len(tokens) - 1)
    return all_sum(torch.where(own.unsqueeze(-1), tokens[at], 0.0))


@torch.no_grad()
def assign_sums(tokens: Tensor, mask: Tensor, ids: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many tokens each code has, (C,), and their sums, (C, D), over all processes; one message, no one-hot."""
    counted = mask.unsqueeze(-1)
    rows = torch.cat([counted.to(tokens.dtype), torch.where(counted, tokens, 0.0)], dim=-1)
    total = tokens.new_zeros(codebook_size, rows.shape[1]).index_add_(0, ids, rows)
    total = all_sum(total)
    return total[:, 0], total[:, 1:]


@register("quantizer", "vq_ema")
class EMAVectorQuantizer(TableQuantizer):
    """VQ with an EMA codebook (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1; vector-quantize-pytorch).

    Training, in this order: ids and codes come from the old codebook; n <- g n + (1 - g) counts,
    s <- g s + (1 - g) sums; n~ = (n + eps) / (sum n + C eps) sum n; codebook <- s / n~ (then unit length with
    `cosine`); codes with n < `dead_threshold` are replaced by random tokens of the batch and their n and s reset to
    the threshold and threshold * token (code bases that forget this reset undo the revival in the next step).
    Counts, sums, k-means and revival tokens are those of all processes. The codebook has no gradient; the only loss
    term is commitment = mean((sg q - z)^2), after normalisation.

    Defaults are those of vector-quantize-pytorch, except that gradients pass straight through. BSQ-ViT's EMA is
    decay 0.99, initial_count 0. State: `codebook`, `cluster_size`, `codebook_sum`, `ready`.

    Args:
        codebook_size: Number of codes, C. The table starts uniform in +-1/C, with `kmeans_init` from the first batch.
        dim: Channels of a code.
        decay: g.
        eps: Smoothing of the counts.
        cosine: Features and codes are unit vectors.
        dead_threshold: Revive codes whose average count is below; 0 never.
        kmeans_init: Start from `kmeans_iters` Lloyd steps on the first batch in which any position counts.
        kmeans_iters: Lloyd steps; an empty cluster keeps its mean.
        initial_count: n at the start.
        gradient: How the gradient passes the discrete choice: straight_through or rotation.
        commitment_weight: Weight of the commitment term.
    """

    codebook: Tensor
    cluster_size: Tensor
    codebook_sum: Tensor
    ready: Tensor

    def __init__(
        self,
        *,
        codebook_size: int,
        dim: int,
        decay: float = 0.8,
        eps: float = 1e-5,
        cosine: bool = False,
        dead_threshold: float = 0.0,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        initial_count: float = 1.0,
        gradient: Gradient = "straight_through",
        commitment_weight: float = 1.0,
    ) -> None:
        super().__init__(codebook_size=codebook_size, dim=dim)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}.")
        self.decay, self.eps, self.cosine = decay, eps, cosine
        self.dead_threshold, self.kmeans_iters, self.gradient = dead_threshold, kmeans_iters, gradient
        self.register_buffer("codebook", torch.empty(codebook_size, dim))
        self.register_buffer("cluster_size", torch.full((codebook_size,), float(initial_count)))
        self.register_buffer("codebook_sum", torch.empty(codebook_size, dim))
        self.register_buffer("ready", torch.tensor(not kmeans_init))
        self._ready: bool | None = None  # `ready` on the host, so that a step does not wait for the device
        self.set_codebook(torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size))
        self.weights = {"commitment": commitment_weight}

    @property
    def codes(self) -> Tensor:
        """The table, (C, D)."""
        return self.codebook.float()

    @torch.no_grad()
    def set_codebook(self, table: Tensor) -> None:
        """Start from a table (C, D); normalised with `cosine`."""
        self.codebook.copy_(self.normalise(table))
        self.codebook_sum.copy_(self.codebook)

    def normalise(self, x: Tensor) -> Tensor:
        """Unit vectors with `cosine`, x itself without."""
        return F.normalize(x, dim=-1, eps=1e-6) if self.cosine else x

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = None

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        z = self.normalise(z)
        tokens = z.detach().reshape(-1, self.dim)
        mask = finite_rows(tokens, positions.flat())
        if self.training and not self._is_ready():
            self._start_from_kmeans(tokens, mask, generator)
        ids = nearest(tokens, self.codes)[0]
        q = F.embedding(ids, self.codes).reshape(z.shape)
        if self.training:
            self._follow(tokens, mask, ids, generator)
        losses = {"commitment": positions.mean((q - z).square())}
        return self.result(ESTIMATORS[self.gradient](z, q), ids.reshape(z.shape[:-1]), losses)

    def _is_ready(self) -> bool:
        if self._ready is None:
            self._ready = bool(self.ready)
        return self._ready

    @torch.no_grad()
    def _follow(self, tokens: Tensor, mask: Tensor, ids: Tensor, generator: torch.Generator | None) -> None:
        counts, sums = assign_sums(tokens, mask, ids, self.codebook_size)
        seen = counts.sum() > 0  # a batch of padding alone changes nothing
        keep = torch.where(seen, self.decay, 1.0)
        self.cluster_size.mul_(keep).add_(counts * (1 - keep))
        self.codebook_sum.mul_(keep).add_(sums * (1 - keep))
        self.codebook.copy_(torch.where(seen, self._averages(), self.codebook))
        if self.dead_threshold > 0:
            self._revive(draw_tokens(tokens, mask, self.codebook_size, generator), seen)

    def _averages(self) -> Tensor:
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        return self.normalise(self.codebook_sum / smoothed.unsqueeze(-1))

    def _revive(self, candidates: Tensor, seen: Tensor) -> None:
        """The j-th dead code takes the j-th candidate; no wait for the device, no branch on the data."""
        dead = (self.cluster_size < self.dead_threshold) & seen
        chosen = candidates[(dead.cumsum(0) - 1).clamp_min(0)]
        rows = dead.unsqueeze(-1)
        self.codebook.copy_(torch.where(rows, chosen, self.codebook))
        self.codebook_sum.copy_(torch.where(rows, chosen * self.dead_threshold, self.codebook_sum))
        self.cluster_size.copy_(torch.where(dead, self.dead_threshold, self.cluster_size))

    @torch.no_grad()
    def _start_from_kmeans(self, tokens: Tensor, mask: Tensor, generator: torch.Generator | None) -> None:
        if not bool(all_sum(mask.sum()) > 0):  # summed over processes, so the same answer on each
            return
        means = draw_tokens(tokens, mask, self.codebook_size, generator)
        counts = self.cluster_size
        for _ in range(self.kmeans_iters):
            counts, sums = assign_sums(tokens, mask, nearest(tokens, means)[0], self.codebook_size)
            moved = self.normalise(sums / counts.clamp_min(1).unsqueeze(-1))
            means = torch.where(counts.unsqueeze(-1) > 0, moved, means)
        self.codebook_sum.copy_(means * counts.unsqueeze(-1))
        self.cluster_size.copy_(counts)
        self.codebook.copy_(torch.where(counts.unsqueeze(-1) > 0, self._averages(), means))
        self.ready.fill_(True)
        self._ready = True
