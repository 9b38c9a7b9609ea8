"""The prior of `spectral_planes`: a distribution for every digit, given how busy the frequencies around it are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vistok.codec.prior import TOTAL, Prior

BUSY = 8
"""Contexts: significant neighbours of a coefficient, 0..7 and more."""
SHRINK = 24.0
"""Pictures that the pooled estimate of a digit's distribution is worth."""


class PlanePrior(Prior):
    """Chance of a digit other than 0 for every position and context, and of the upper half where it refines.

    The context of a coefficient is the number of significant ones among its eight neighbours in frequency and the same
    frequency of the other colours, as far as earlier rounds have told. A round ends before the second digit of a
    coefficient and after `STEP` digits.

    Args:
        coefficient: Coefficient of every digit in (3, H, W) order, (K, D).
        shape: (H, W).
        found: Chance of becoming significant in 1 / TOTAL, even numbers, (K * D, BUSY).
        upper: Chance of the upper half in 1 / TOTAL, (K * D,).
        radix: Digits per id.
    """

    kind = "planes"
    STEP = 84

    def __init__(
        self, *, coefficient: np.ndarray, shape: np.ndarray, found: np.ndarray, upper: np.ndarray, radix: np.ndarray
    ) -> None:
        self.coefficient, self.shape, self.found, self.upper, self.radix = coefficient, shape, found, upper, radix
        self.tokens, self.digits = coefficient.shape
        used, self.place = np.unique(coefficient, return_inverse=True)
        self.place = self.place.reshape(-1)
        self.around = _neighbours(used, (int(shape[0]), int(shape[1])))
        self.cuts = self._cuts()

    def arrays(self) -> dict[str, np.ndarray]:
        """See `Prior.arrays`."""
        names = ("coefficient", "shape", "found", "upper", "radix")
        return {name: getattr(self, name) for name in names}

    def count(self, k: int) -> int:
        """See `Prior.count`."""
        return k * self.digits

    def symbols(self, ids: Tensor) -> np.ndarray:
        """See `Prior.symbols`: digits 0, 1, 2 for -1, 0, 1."""
        rows = ids.cpu().numpy().reshape(len(ids), self.digits // int(self.radix), 1)  # (k, G, 1)
        return (rows // 3 ** np.arange(int(self.radix)) % 3).astype(np.int32).reshape(-1)

    def ids(self, symbols: np.ndarray, k: int) -> Tensor:
        """See `Prior.ids`."""
        digits = symbols.astype(np.int64).reshape(k, self.digits // int(self.radix), int(self.radix))
        ids = torch.from_numpy((digits * 3 ** np.arange(int(self.radix))).sum(-1))
        return ids.squeeze(-1) if ids.shape[-1] == 1 else ids

    def rounds(self, k: int, seen: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """See `Prior.rounds`."""
        end = self.count(k)
        known = np.zeros(len(self.around) + 1, dtype=bool)  # the last one stands for "outside"
        for start, stop in zip(self.cuts, self.cuts[1:]):
            part = slice(start, min(stop, end))
            if start >= end:
                return
            place = self.place[part]
            busy = known[self.around[place]].sum(1).clip(0, BUSY - 1)
            yield part, self._table(part, busy, known[place])
            known[place] |= seen[part] != 1

    def _table(self, part: slice, busy: np.ndarray, known: np.ndarray) -> np.ndarray:
        found = self.found[part].astype(np.int64)[np.arange(len(busy)), busy]
        fresh = np.stack([found // 2, TOTAL - found, found // 2], 1)
        upper = self.upper[part].astype(np.int64)
        finer = np.stack([TOTAL - 1 - upper, np.ones_like(upper), upper], 1)
        return np.where(known[:, None], finer, fresh)

    def _cuts(self) -> list[int]:
        cuts, seen = [0], set()
        for i, place in enumerate(self.place.tolist()):
            if place in seen or i - cuts[-1] >= self.STEP:
                cuts.append(i)
                seen = set()
            seen.add(place)
        return [*cuts, len(self.place)]

    @classmethod
    def fit(cls, digits: np.ndarray, coefficient: np.ndarray, size: tuple[int, int], radix: int) -> PlanePrior:
        """From the digits -1, 0, 1 of many pictures, int8 (B, K, D).

        Chances are shrunk towards those of all digits of alike chance in the same context.
        """
        slots, symbols = coefficient.size, digits.reshape(len(digits), -1) + 1
        empty = np.full((slots, BUSY), 2), np.full(slots, TOTAL // 2)
        same = {"coefficient": coefficient, "shape": np.array(size), "radix": np.array(radix)}
        plain = cls(**same, found=empty[0], upper=empty[1])
        seen, hits = np.zeros((slots, BUSY)), np.zeros((slots, BUSY))
        finer, upper = np.full(slots, 64.0), np.full(slots, 30.0)
        known = np.zeros((len(symbols), len(plain.around) + 1), dtype=bool)
        for start, stop in zip(plain.cuts, plain.cuts[1:]):
            place, now = plain.place[start:stop], symbols[:, start:stop]
            busy, old = known[:, plain.around[place]].sum(2).clip(0, BUSY - 1), known[:, place]  # (B, n)
            for c in range(BUSY):
                here = ~old & (busy == c)
                seen[start:stop, c], hits[start:stop, c] = here.sum(0), (here & (now != 1)).sum(0)
            finer[start:stop] += old.sum(0)
            upper[start:stop] += (old & (now == 2)).sum(0)
            known[:, place] |= now != 1
        chance = _shrunk(hits, seen)
        even = (chance * TOTAL / 2).round().clip(1, TOTAL // 2 - 1).astype(np.int64) * 2
        high = (upper / finer * TOTAL).round().clip(1, TOTAL - 2).astype(np.int64)
        return cls(**same, found=even.astype(np.uint16), upper=high.astype(np.uint16))


def _shrunk(hits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Chance per slot and context, (S, C): own counts plus `SHRINK` of what alike slots have in that context."""
    own = (hits.sum(1) + 0.1) / (seen.sum(1) + 1)
    bins = np.digitize(np.log2(own), np.arange(-12, 0, 0.5))
    top, all_ = np.zeros((bins.max() + 1, BUSY)), np.zeros((bins.max() + 1, BUSY))
    np.add.at(top, bins, hits)
    np.add.at(all_, bins, seen)
    ratio = (top + 2 * own.mean()) / (all_ + 2)  # (bins, C)
    mean = (top.sum(1) + 1e-3) / (all_.sum(1) + 1e-2)
    pooled = (own[:, None] * (ratio / mean[:, None])[bins]).clip(1e-5, 0.98)
    return (hits + SHRINK * pooled) / (seen + SHRINK)


def _neighbours(used: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Places among `used` of the ten coefficients around each, (C, 10); C where there is none."""
    height, width = size
    where = np.full((3, height + 2, width + 2), len(used))
    colour, row, column = np.unravel_index(used, (3, height, width))
    where[colour, row + 1, column + 1] = np.arange(len(used))
    near = [where[colour, row + 1 + y, column + 1 + x] for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    return np.stack([*near, *(where[(colour + c) % 3, row + 1, column + 1] for c in (1, 2))], 1)
