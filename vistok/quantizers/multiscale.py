"""Multi-scale residual quantisation: one table, coarse grids before fine ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.quantizers.base import Positions, Quantized, straight_through
from vistok.quantizers.search import nearest
from vistok.quantizers.superposition import Superposition
from vistok.quantizers.vq import TableQuantizer
from vistok.registry import register


class _Blend(nn.Module):
    """(1 - r) h + r conv3x3(h): smooths what up-sampling leaves."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        """Features (B, D, h, w) -> the same shape, float32."""
        bias = self.conv.bias
        smooth = F.conv2d(h, self.conv.weight.float(), None if bias is None else bias.float(), padding=1)
        return h * (1 - self.ratio) + smooth * self.ratio


@register("quantizer", "multiscale")
class MultiScaleQuantizer(TableQuantizer):
    """Multi-scale residual VQ (VAR, Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2).

    For scales p_1 < ... < p_K = side of the grid: the rest is area-averaged to p_k x p_k (not at the last), each cell
    gets its nearest code, codes go back to full size bicubically, through phi_k(h) = (1 - r) h + r conv3x3(h), are
    added to f^ and taken off the rest. Terms, means over scales: codebook = mse(f^_k, sg f), commitment =
    mse(sg f^_k, f); weights 1 and 0.25. Code: f^ with a straight-through gradient.

    Ids of all scales follow each other, coarse first, row by row: (B, sum p_k^2); `forward` needs the `grid`, and a
    `mask` is refused, since averaging would mix padding in.

    Args:
        codebook_size: Number of codes (published 4096). The table starts uniform in +-1/C.
        dim: Channels of a code (published 32).
        scales: p_1 .. p_K.
        blend: r.
        shared_blends: Number of phi convolutions shared by the scales (published 4).
        cosine: Nearest by angle instead of distance (`using_znorm`).
        commitment_weight: Weight of the commitment term.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        dim: int,
        scales: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        blend: float = 0.5,
        shared_blends: int = 4,
        cosine: bool = False,
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__(codebook_size=codebook_size, dim=dim)
        scales = tuple(scales)
        if not scales or scales[0] < 1 or any(a >= b for a, b in itertools.pairwise(scales)):
            raise ValueError(f"scales must be whole numbers that grow, e.g. (1, 2, 4, 8), got {scales}.")
        if shared_blends < 1:
            raise ValueError(f"shared_blends must be at least 1, got {shared_blends}.")
        self.scales = scales
        self.cosine = cosine
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.blends = nn.ModuleList([_Blend(dim, blend) for _ in range(shared_blends)])
        self.weights = {"codebook": 1.0, "commitment": commitment_weight}

    @property
    def codes(self) -> Tensor:
        """The table, (C, D)."""
        return self.embedding.weight.float()

    def num_ids(self, n: int, grid: tuple[int, int] | None = None) -> int:
        """Sum of p_k^2.

        Raises:
            ValueError: n or the grid does not fit the last scale.
        """
        self._check_grid(n, grid)
        return sum(p * p for p in self.scales)

    def _check_grid(self, n: int, grid: tuple[int, int] | None) -> None:
        side = self.scales[-1]
        if n != side * side or (grid is not None and tuple(grid) != (side, side)):
            own = math.isqrt(n)
            if own * own == n and (grid is None or tuple(grid) == (own, own)):
                fits = [p for p in self.scales if p < own] + [own]
                advice = f"Let scales end at the side of the grid, e.g. {fits}."
            else:
                advice = "Let scales end at the side of the grid, which has to be square: change the number of tokens."
            raise ValueError(
                f"multiscale with scales {self.scales} quantises a {side}x{side} grid and got {n} positions"
                f"{'' if grid is None else f' on a {grid[0]}x{grid[1]} grid'}. {advice}"
            )

    def _blend(self, k: int) -> nn.Module:
        """The phi convolution of scale k: the one whose tick is nearest to k / (K - 1)."""
        count = len(self.blends)
        margin = 1 / (3 * count) if count == 4 else 1 / (2 * count)
        ticks = torch.linspace(margin, 1 - margin, count, dtype=torch.float64, device="cpu")
        place = k / max(len(self.scales) - 1, 1)
        return self.blends[int((ticks - place).abs().argmin())]

    def _spread(self, rows: Tensor, k: int) -> Tensor:
        """What scale k contributes: rows of the table (B, p_k^2, D) -> (B, D, side, side)."""
        side, p = self.scales[-1], self.scales[k]
        h = rows.transpose(1, 2).unflatten(-1, (p, p))  # (B, D, p, p)
        if p != side:
            h = F.interpolate(h, size=(side, side), mode="bicubic")
        spread: Tensor = self._blend(k)(h)
        return spread

    def _onto_grid(self, rows: Tensor, k: int) -> Tensor:
        """The same, channels last: (B, side, side, D)."""
        return self._spread(rows, k).permute(0, 2, 3, 1)

    def _choose(self, rest: Tensor, p: int) -> Tensor:
        """Nearest codes of a rest (B, D, side, side) at scale p: (B, p^2)."""
        small = rest if p == rest.shape[-1] else F.interpolate(rest, size=(p, p), mode="area")
        cells, table = small.flatten(2).transpose(1, 2), self.codes.detach()
        if self.cosine:
            cells, table = F.normalize(cells, dim=-1), F.normalize(table, dim=-1)
        return nearest(cells.reshape(-1, self.dim), table)[0].reshape(cells.shape[:2])

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        self._check_grid(z.shape[1], grid)
        if positions.mask is not None:
            raise ValueError("multiscale averages over the grid and takes no mask. Quantise whole grids.")
        side = self.scales[-1]
        f = z.transpose(1, 2).unflatten(-1, (side, side))  # (B, D, side, side)
        rest, total, ids = f.detach(), torch.zeros_like(f), []
        codebook, commitment = [], []
        for k, p in enumerate(self.scales):
            ids.append(self._choose(rest, p))
            h = self._spread(self.rows(ids[-1]), k)
            rest, total = rest - h.detach(), total + h
            codebook.append(self._error(total, f.detach(), positions))
            commitment.append(self._error(total.detach(), f, positions))
        losses = {"codebook": torch.stack(codebook).mean(), "commitment": torch.stack(commitment).mean()}
        codes = straight_through(z, total.flatten(2).transpose(1, 2))
        return self.result(codes, torch.cat(ids, dim=1), losses)

    @staticmethod
    def _error(a: Tensor, b: Tensor, positions: Positions) -> Tensor:
        return positions.mean((a - b).square().flatten(2).transpose(1, 2))

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Sum over the scales: int64 (B, sum p_k^2) -> (B, side^2, D) float32.

        Raises:
            ValueError: Another number of ids or grid, or an id outside the table.
        """
        counts = [p * p for p in self.scales]
        if ids.ndim != 2 or ids.shape[1] != sum(counts):
            raise ValueError(f"multiscale has ids (B, {sum(counts)}), all scales in turn, and got {tuple(ids.shape)}.")
        if grid is not None:
            self._check_grid(grid[0] * grid[1], grid)
        with torch.autocast(ids.device.type, enabled=False):
            parts = self.check_ids(ids).split(counts, dim=1)
            total = torch.stack([self._spread(self.rows(part), k) for k, part in enumerate(parts)]).sum(0)
        return total.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids that decode to the given codes: (B, side^2, D) -> int64 (B, sum p_k^2).

        The ids are hidden in a sum: the finest scale alone spans the grid, and encoding the sum again gives hardly any
        of them back. `Superposition` finds them by message passing and least squares, and returns only ids that add up
        to the codes. Memory grows with (side^2 D)^2; at the published size (8192^2) a picture takes minutes on a CPU,
        and up to six times as long where it is refused.

        Two lists of ids can have one sum: row a in all of a scale and row b in all of another with the same phi, or b
        and a. One of them comes back, if any. Found on tables of 64 x 8 and 16 x 4, normal or untrained, at scales
        (1, 2, 4): 1119 of 1120 lists of 14 kinds, from random ids over features to one row in all of a scale. Found on
        an untrained table of 128 x 16 at scales 1 .. 6: all 40 of random ids and of normal features, 10 of 20 of
        constant features, 250 of 280 in all. Keep the ids of `forward` where you can.

        Raises:
            ValueError: Wrong shape, or codes whose ids were not found.
        """
        codes = self.check_codes(codes)
        self._check_grid(codes.shape[1], None)
        side = self.scales[-1]
        with torch.autocast(codes.device.type, enabled=False):
            scales = [(p * p, partial(self._onto_grid, k=k)) for k, p in enumerate(self.scales)]
            sums = Superposition(self.codes, scales)
            found = [sums.find(total) for total in codes.unflatten(1, (side, side))]
        lost = [i for i, ids in enumerate(found) if ids is None]
        if lost:
            raise ValueError(f"No ids were found that decode to codes {lost}. Keep the ids of forward.")
        return torch.stack([ids for ids in found if ids is not None])
