"""Tell a sum of table rows apart: which row did each token add?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.quantizers.search import find_rows

Spread = Callable[[Tensor], Tensor]

_NOISE = 1e-3  # of the sum's variance: keeps the covariance invertible in float32 when all tokens are sure
_SURE = 0.99  # probability above which a token's row is taken as known in least squares
_ATTEMPTS = ((0.0, 0.0), (0.0, 0.3), (0.5, 0.0), (0.9, 0.3), (0.98, 0.5), (0.0, 0.5))
"""Share of the first covariance that the tokens of a set have in common, share of the old mean and covariance kept."""
_ROUNDS = 6
_MISFIT = 10.0  # an attempt that is so sure of wrong rows does not come back


@dataclass(frozen=True)
class _Block:
    """Tokens that reach the same window: numbers (t,), rows and columns of the window, maps (t, D, w D)."""

    tokens: Tensor
    window: tuple[slice, slice]
    maps: Tensor

    def cut(self, matrix: Tensor) -> Tensor:
        """The window of a (S, S, D, S, S, D) matrix, a view."""
        rows, cols = self.window
        return matrix[rows, cols, :, rows, cols]


@dataclass(frozen=True)
class _Evidence:
    """What the sum says of each token, the others taken for Gaussian: exp(w . pull - w . precision w / 2)."""

    pull: Tensor
    precision: Tensor
    misfit: float  # |rest|^2 against its expectation: above 1 the tokens are less certain than they claim


class Superposition:
    """Finds ids from sum_i (A_i e[ids_i] + b_i): each token adds a row of one table through a known affine map.

    The sum is exact, so this is decoding a sparse superposition code without noise (Joseph and Barron 2012,
    arXiv 1006.3870). It is decoded by approximate message passing (Rush, Greig, Venkataramanan 2017, arXiv 1501.05892)
    with a linear-MMSE step (Rangan, Schniter, Fletcher 2019, arXiv 1610.03082), here with the full covariance:

    1. Each token has a mean and a covariance, at first those of the table. The sum is taken for Gaussian.
    2. What the sum says of one token is Gaussian too. With the table that makes a probability of each row, hence a new
       mean and covariance. A prior exp(-l |w|^2 / 2) per set of tokens follows the size of the rows that the set uses.
       Repeat; where the rest does not fit the covariance, the evidence is weakened by the misfit.
    3. When few tokens are open, those are free vectors in a least-squares problem. It has no noise, so that it gives
       rows of the table, if the closed tokens are right; where a rest stays, tokens that explain most of it are opened.

    Should that fail, it is done again with damped means and covariances, and from a first covariance under which the
    tokens of a set resemble each other: w_i = sqrt(s) u + sqrt(1 - s) v_i. Where a set uses one row or a few again and
    again, as on a flat picture, the free vectors of 1. put the common part on the wrong set. Memory: two matrices
    (S S D)^2 of float32.

    Args:
        table: (C, D) float32.
        sets: Pairs of a number of tokens t and an affine function from rows (n, t, D) to sums (n, S, S, D).
    """

    def __init__(self, table: Tensor, sets: Iterable[tuple[int, Spread]]) -> None:
        mean, dim = table.mean(0), table.shape[1]
        centred = (table - mean).double()
        size, axes = torch.linalg.eigh(centred.T @ centred / len(table))
        size = size.clamp_min(max(1e-6 * float(size.max()), 1e-20)).sqrt()
        self.rows = (centred @ (axes / size)).float()  # (C, D), whitened: mean 0, covariance 1
        colour = (axes * size).T.float()
        self.norms = self.rows.square().sum(-1)
        self.dim, self.offset = dim, table.new_zeros(())
        numbers: list[int] = []
        windows: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for number, (count, spread) in enumerate(sets):
            self.offset = self.offset + spread(mean.expand(1, count, -1))[0]
            still = spread(table.new_zeros(1, count, dim))
            for t in range(count):
                basis = table.new_zeros(dim, count, dim)
                basis[:, t] = torch.eye(dim, device=table.device)
                reach = spread(basis) - still  # (D, S, S, D)
                at = (reach != 0).any(-1).any(0).nonzero()
                window = (*at.amin(0).tolist(), *(at.amax(0) + 1).tolist())
                part = colour @ reach[:, window[0] : window[2], window[1] : window[3]].flatten(1)
                windows.setdefault(window, []).append((len(numbers), part))
                numbers.append(number)
        self.sets = torch.tensor(numbers, device=table.device)  # (T,)
        self.num_sets = numbers[-1] + 1
        self.blocks = [
            _Block(
                torch.tensor([token for token, _ in found], device=table.device),
                (slice(top, bottom), slice(left, right)),
                torch.stack([part for _, part in found]),
            )
            for (top, left, bottom, right), found in windows.items()
        ]
        self.shape = self.offset.shape  # (S, S, D)
        self.noise = _NOISE * sum(float(b.maps.square().sum()) for b in self.blocks) / self.offset.numel()
        self._first: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def find(self, total: Tensor) -> Tensor | None:
        """Ids whose rows add up to the total: (S, S, D) float32 -> int64 (T,), None if none were found."""
        total = total - self.offset
        room = total.shape[0] * total.shape[1]  # tokens that as many equations as there are determine
        for share, damping in _ATTEMPTS:
            mean, covariance = total.new_zeros(len(self.sets), self.dim), self._identity()
            prior = total.new_zeros(self.num_sets, 1)
            for n in range(_ROUNDS):
                if n == 0:
                    evidence = self._evidence(mean, covariance, total, self._start(share), share)
                else:
                    evidence = self._evidence(mean, covariance, total, self._factor(covariance))
                chance, prior = self._posterior(evidence, prior)
                sure, ids = chance.max(-1)
                if int((sure < _SURE).sum()) <= (room if n == _ROUNDS - 1 else room // 2):
                    found = self._complete(ids, sure < _SURE, total)
                    if found is not None:
                        return found
                if n > 0 and evidence.misfit > _MISFIT:
                    break
                mean = torch.lerp(chance @ self.rows, mean, damping)
                covariance = torch.lerp(self._covariance(chance), covariance, damping)
        return None

    def _identity(self) -> Tensor:
        """The covariance of a whitened row, for each token, (T, D, D)."""
        return torch.eye(self.dim, device=self.rows.device).repeat(len(self.sets), 1, 1)

    def _sum(self, x: Tensor) -> Tensor:
        """Whitened vectors of all tokens (T, D) -> what they add up to, (S, S, D)."""
        total = x.new_zeros(self.shape)
        for block in self.blocks:
            part = total[block.window]
            part += torch.einsum("td,tdm->m", x[block.tokens], block.maps.to(x.dtype)).view_as(part)
        return total

    def _match(self, rest: Tensor) -> Tensor:
        """The transpose of `_sum`: (S, S, D) -> (T, D)."""
        out = rest.new_empty(len(self.sets), self.dim)
        for block in self.blocks:
            out[block.tokens] = block.maps.to(rest.dtype) @ rest[block.window].flatten()
        return out

    def _pool(self, x: Tensor, share: float) -> Tensor:
        """(1 - s) of each token's own plus s of all of its set's, (T, ...)."""
        pooled = x.new_zeros(self.num_sets, *x.shape[1:]).index_add_(0, self.sets, x)
        return (1 - share) * x + share * pooled[self.sets]

    def _start(self, share: float) -> tuple[Tensor, Tensor]:
        """`_factor` at the first covariance, where A_i is `_pool`ed over the set; without a share it is kept."""
        if share == 0:
            if self._first is None:
                self._first = self._factor(self._identity())
            return self._first
        common = self.offset.new_zeros(self.num_sets, self.dim, *self.shape)
        for block in self.blocks:
            part = common[:, :, block.window[0], block.window[1]]
            part.index_add_(0, self.sets[block.tokens], block.maps.view(-1, *part.shape[1:]))
        common = common.flatten(2)  # (sets, D, S S D)
        lower, own = self._factor((1 - share) * self._identity(), share**0.5 * common.flatten(0, 1))
        weighted = torch.cholesky_solve(common.flatten(0, 1).T, lower).view(*self.shape, *common.shape[:2])
        cross = torch.empty_like(own)
        for block in self.blocks:
            part = weighted[block.window].flatten(0, 2).transpose(0, 1)  # (sets, w D, D)
            cross[block.tokens] = block.maps @ part[self.sets[block.tokens]]
        own = (1 - share) ** 2 * own + share * (1 - share) * cross
        return lower, own + share * self._pool(cross.mT, share)

    def _factor(self, covariance: Tensor, common: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cholesky factor of the sum's covariance, given the tokens', and A_i^T (its inverse) A_i, (T, D, D).

        To the covariance of the tokens comes that of the common parts, which reach the sum by (sets D, S S D).
        """
        size = self.offset.numel()
        matrix = covariance.new_zeros(size, size)
        for block in self.blocks:
            part = block.cut(matrix.view(*self.shape, *self.shape))
            left = (covariance[block.tokens] @ block.maps).flatten(0, 1)
            part += (block.maps.flatten(0, 1).T @ left).view_as(part)
        if common is not None:
            matrix.addmm_(common.T, common)
        matrix.diagonal().add_(self.noise)
        lower = torch.linalg.cholesky(matrix)
        del matrix, part
        inverse = torch.cholesky_inverse(lower).view(*self.shape, *self.shape)
        gain = torch.empty_like(covariance)
        for block in self.blocks:
            width = block.maps.shape[-1]
            weighted = block.maps.flatten(0, 1) @ block.cut(inverse).reshape(width, width)
            gain[block.tokens] = weighted.view_as(block.maps) @ block.maps.mT
        return lower, gain

    def _evidence(
        self, mean: Tensor, covariance: Tensor, total: Tensor, factor: tuple[Tensor, Tensor], share: float = 0.0
    ) -> _Evidence:
        """Linear MMSE, a token's own mean and covariance taken out of the answer."""
        lower, gain = factor
        rest = total - self._sum(mean)
        weighted = torch.cholesky_solve(rest.reshape(-1, 1), lower).view_as(rest)
        misfit = float((weighted * rest).mean())
        pull = self._pool(self._match(weighted), share)
        inverse = torch.linalg.inv(gain.double())
        inverse = (inverse + inverse.mT) / 2
        size, axes = torch.linalg.eigh(inverse - covariance)
        size = torch.maximum(size, 1e-3 * torch.linalg.eigvalsh(inverse)[:, :1])
        precision = (axes / size.unsqueeze(-2)) @ axes.mT / max(misfit, 1.0)
        guess = mean + (inverse @ pull.double().unsqueeze(-1)).squeeze(-1)
        return _Evidence((precision @ guess.unsqueeze(-1)).squeeze(-1).float(), precision.float(), misfit)

    def _posterior(self, evidence: _Evidence, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of each row for each token, (T, C), and the sets' priors l, (sets, 1)."""
        fit = evidence.pull @ self.rows.T
        for i, precision in enumerate(evidence.precision):
            fit[i] -= ((self.rows @ precision) * self.rows).sum(-1) / 2
        chance = (fit - prior[self.sets] * self.norms / 2).softmax(-1)
        size = torch.stack([(chance[self.sets == k] @ self.norms).mean() for k in range(len(prior))]).unsqueeze(-1)
        low, high = torch.full_like(prior, -0.2), torch.full_like(prior, 20.0)
        for _ in range(40):  # bisection: the prior under which rows have the size that the set's tokens have
            prior = (low + high) / 2
            large = ((-prior * self.norms / 2).softmax(-1) * self.norms).sum(-1, keepdim=True) > size
            low, high = torch.where(large, prior, low), torch.where(large, high, prior)
        return (fit - prior[self.sets] * self.norms / 2).softmax(-1), prior

    def _covariance(self, chance: Tensor) -> Tensor:
        """Covariance of each token's row, (T, C) -> (T, D, D); centred first, so that it is never negative."""
        out = chance.new_empty(len(chance), self.dim, self.dim)
        for i, p in enumerate(chance):
            away = self.rows - p @ self.rows
            out[i] = (away * p.unsqueeze(-1)).T @ away
        return out

    def _complete(self, ids: Tensor, free: Tensor, total: Tensor) -> Tensor | None:
        """Least squares over the free tokens (T,) bool, opening more until nothing is left of the total."""
        room = max(int(free.sum()), total.shape[0] * total.shape[1] * 5 // 8)
        exact = 1e-5 * float(total.abs().max()) + 1e-6 * float(self.offset.abs().max())  # float32 rounding
        total, left = total.double(), float("inf")
        grams = total.new_empty(len(ids), self.dim, self.dim)
        for block in self.blocks:
            grams[block.tokens] = (block.maps @ block.maps.mT).double()
        grams = torch.linalg.inv(grams)
        while int(free.sum()) <= room:
            x = self.rows[ids].double()
            x[free] = 0
            rest = total - self._sum(x)
            maps = self._columns(free.nonzero().squeeze(-1))
            gram = maps @ maps.T
            gram.diagonal().add_(1e-9 * self.noise / _NOISE)
            found = torch.cholesky_solve((maps @ rest.flatten()).unsqueeze(-1), torch.linalg.cholesky(gram))
            rest = rest - (found.T @ maps).view_as(rest)
            ids = ids.clone()
            ids[free] = find_rows(found.view(-1, self.dim).float(), self.rows)
            if (total - self._sum(self.rows[ids].double())).abs().max() <= exact:
                return ids
            if rest.norm() < 1e-5 * total.norm() or rest.norm() > 0.98 * left:
                return None  # nothing more to learn from the rest
            left = float(rest.norm())
            pull = self._match(rest)
            score = (pull * (grams @ pull.unsqueeze(-1)).squeeze(-1)).sum(-1).masked_fill(free, 0)
            free = free.index_fill(0, score.topk(min(8, len(score))).indices, True)
        return None

    def _columns(self, tokens: Tensor) -> Tensor:
        """Maps of some tokens as a matrix, (t D, S S D) float64."""
        place = {token: n for n, token in enumerate(tokens.tolist())}
        out = torch.zeros(len(place), self.dim, *self.shape, dtype=torch.float64, device=tokens.device)
        for block in self.blocks:
            for token, maps in zip(block.tokens.tolist(), block.maps, strict=True):
                if token in place:
                    part = out[place[token]][:, block.window[0], block.window[1]]
                    part += maps.view_as(part)
        return out.view(len(place) * self.dim, self.offset.numel())
