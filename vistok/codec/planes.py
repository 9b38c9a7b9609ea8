"""The prior of `spectral_planes`: a distribution for every digit, given what is known of the frequencies around it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.codec.prior import TOTAL, Prior

NEVER = 64
"""Plane of a coefficient that is not significant yet."""
UNIT = 16
"""What features count in: sixteenths."""
LOGIT = 256
"""The same for log odds."""
WINDOW, SHRINK = 65, 8.0
"""The chance of a digit is shrunk towards that of so many around it in its plane, worth so many pictures."""
HIDDEN, BATCH, TRAINED = 32, 1 << 14, 600
"""Width of the network, digits a step of its fit, and the most pictures it sees."""


class PlanePrior(Prior):
    """The chance that a digit is not 0, by position and by what is known of the frequencies around it.

    A small network reads ten features of a coefficient that is not significant yet: how large its neighbours in
    frequency are, near, diagonal and two steps away, the same frequency of the other colours and what is around that
    one; how many neighbours are significant, and how many were just found not to be; how many coefficients of the
    picture are significant, compared with what was to be expected; the plane; and the log odds of the position, to
    which the network adds. All in whole numbers, so that every machine computes the same. Signs are even; a refining
    digit has the chance of its position. The digits of a token are told at once, but those of one coefficient in turn.

    Args:
        coefficient: Coefficient of every digit in (3, H, W) order, (K, D).
        shape: (H, W).
        radix: Digits per id.
        odds: Log odds of every digit that its coefficient becomes significant, in 1 / LOGIT, (K * D,).
        upper: Chance of the upper half in 1 / TOTAL, (K * D,).
        first, bias, last: The network: (10, HIDDEN) in 1 / 1024, (HIDDEN + 1,) in 1 / 16384, (HIDDEN,) in 1 / 1024.
        chances: Half the chance for log odds from -10 to 10, in 1 / TOTAL; stored, as are `logs`, because the last
            digit of an exponential depends on the machine.
        logs: log2(1 + n) in sixteenths.
    """

    kind = "planes"

    def __init__(
        self,
        *,
        coefficient: np.ndarray,
        shape: np.ndarray,
        radix: np.ndarray,
        odds: np.ndarray,
        upper: np.ndarray,
        first: np.ndarray,
        bias: np.ndarray,
        last: np.ndarray,
        chances: np.ndarray,
        logs: np.ndarray,
    ) -> None:
        self.coefficient, self.shape, self.radix, self.odds, self.upper = coefficient, shape, radix, odds, upper
        self.first, self.bias, self.last, self.chances, self.logs = first, bias, last, chances, logs
        self.tokens, self.digits = coefficient.shape
        used, self.place = np.unique(coefficient, return_inverse=True)
        self.place = self.place.reshape(-1)
        self.size = len(used)
        self.plane = _occurrences(self.place)
        self.around = _neighbours(used, (int(shape[0]), int(shape[1])))
        self.parts = self._parts()
        self._chances, self._logs, self._odds = (x.astype(np.int64) for x in (chances, logs, odds))
        self._first, self._last = first.astype(np.int64), last.astype(np.int64)
        self.expected = 2 * self._chances[self._index(self._odds)]

    def arrays(self) -> dict[str, np.ndarray]:
        """See `Prior.arrays`."""
        names = ("coefficient", "shape", "radix", "odds", "upper", "first", "bias", "last", "chances", "logs")
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

    def rounds(self, k: int, seen: np.ndarray) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
        """See `Prior.rounds`."""
        end, known = self.count(k), Known(self, 1)
        for part in self.parts:
            if part[0] >= end:
                return
            found = self._chances[self._index(self.logits(known.features(part), part))][0]
            fresh = np.stack([found, TOTAL - 2 * found, found], 1)
            upper = self.upper[part].astype(np.int64)
            finer = np.stack([TOTAL - 1 - upper, np.ones_like(upper), upper], 1)
            yield part, np.where(known.significant(part)[0, :, None], finer, fresh)
            known.update(part, seen[None, part])

    def logits(self, features: np.ndarray, part: np.ndarray) -> np.ndarray:
        """Log odds in 1 / LOGIT from features (B, n, 10), int64 (B, n)."""
        hidden = (features @ self._first + self.bias[:-1]).clip(0) >> 6  # in 1 / 256
        change = hidden @ self._last + (int(self.bias[-1]) << 4)  # in 1 / 2^18
        logits: np.ndarray = self._odds[part] + (change >> 10)
        return logits

    def _index(self, logits: np.ndarray) -> np.ndarray:
        return (logits + len(self.chances) // 2).clip(0, len(self.chances) - 1)

    def _parts(self) -> list[np.ndarray]:
        parts = []
        for start in range(0, len(self.place), self.digits):
            turn = _occurrences(self.place[start : start + self.digits])
            parts += [start + np.flatnonzero(turn == i) for i in range(turn.max() + 1)]
        return parts

    @classmethod
    def fit(cls, digits: np.ndarray, coefficient: np.ndarray, size: tuple[int, int], radix: int) -> PlanePrior:
        """From the digits -1, 0, 1 of many pictures, int8 (B, K, D)."""
        symbols = digits.reshape(len(digits), -1) + 1
        slots = symbols.shape[1]
        given = {"coefficient": coefficient, "shape": np.array(size), "radix": np.array(radix)}
        given |= _tables()
        network = {
            "first": np.zeros((10, HIDDEN), np.int32),
            "bias": np.zeros(HIDDEN + 1, np.int32),
            "last": np.zeros(HIDDEN, np.int32),
        }
        plain = cls(**given, **network, odds=np.zeros(slots, np.int16), upper=np.full(slots, TOTAL // 2, np.uint16))
        odds, upper = _positions(plain, symbols)
        plain = cls(**given, **network, odds=odds, upper=upper)
        chosen = np.random.default_rng(0).permutation(len(symbols))[:TRAINED]
        return cls(**given, **_network(*_events(plain, symbols[chosen])), odds=odds, upper=upper)


class Known:
    """What has been told of the coefficients of B pictures.

    Args:
        prior: What knows the places.
        count: Pictures, B.
    """

    def __init__(self, prior: PlanePrior, count: int) -> None:
        self.prior = prior
        self.found = np.full((count, prior.size + 1), NEVER, np.int16)  # the last place stands for "outside"
        self.tested = np.full((count, prior.size + 1), -1, np.int16)
        self.hits = np.ones(count, np.int64)
        self.due = np.full(count, TOTAL, np.int64)

    def significant(self, part: np.ndarray) -> np.ndarray:
        """Whether the coefficients of some digits are significant, (B, n)."""
        return self.found[:, self.prior.place[part]] < NEVER

    def features(self, part: np.ndarray) -> np.ndarray:
        """What the network reads, in sixteenths, int64 (B, n, 10)."""
        prior, place = self.prior, self.prior.place[part]
        plane, logs = prior.plane[part], prior._logs
        around = prior.around[place]  # (n, 42)
        found = self.found[:, around]  # (B, n, 42)
        size = np.where(found < NEVER, 1 << (plane[:, None] - found).clip(0, 3), 0)
        ends = ((0, 4), (4, 8), (8, 24), (24, 26), (26, 42))  # near, diagonal, far, other colours, around those
        sums = [logs[size[..., a:b].sum(-1)] for a, b in ends]
        missed = (found[..., :8] == NEVER) & (self.tested[:, around[:, :8]] >= plane[:, None])
        top = len(logs) - 1
        busy = logs[(self.hits * UNIT).clip(0, top)] - logs[(self.due * UNIT // TOTAL).clip(0, top)]
        same = [UNIT * plane, prior._odds[part] * UNIT // LOGIT]
        counts = [UNIT * (found[..., :8] < NEVER).sum(-1), UNIT * missed.sum(-1)]
        every = [*sums, *counts, busy[:, None], *(x[None] for x in same)]
        return np.stack(np.broadcast_arrays(*every), -1).astype(np.int64)

    def update(self, part: np.ndarray, symbols: np.ndarray) -> None:
        """Enter digits, 0, 1, 2 for -1, 0, 1, (B, n)."""
        place, plane = self.prior.place[part], self.prior.plane[part]
        fresh = ~self.significant(part)
        hit = fresh & (symbols != 1)
        self.hits += hit.sum(1)
        self.due += (fresh * self.prior.expected[part]).sum(1)
        self.found[:, place] = np.where(hit, plane, self.found[:, place])
        self.tested[:, place] = plane


def _tables() -> dict[str, np.ndarray]:
    """`chances` and `logs` of a new prior."""
    odds = np.arange(-10 * LOGIT, 10 * LOGIT) / LOGIT
    chances = (TOTAL / 2 / (1 + np.exp(-odds))).round().clip(1, TOTAL // 2 - 1)
    logs = (UNIT * np.log2(1 + np.arange(1 << 16))).round()
    return {"chances": chances.astype(np.uint16), "logs": logs.astype(np.int16)}


def _positions(prior: PlanePrior, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log odds of becoming significant, and chance of the upper half, of every digit."""
    found = np.zeros((len(symbols), prior.size), bool)
    seen, hits, finer, upper = np.zeros((4, symbols.shape[1]))
    for part in prior.parts:
        place, now = prior.place[part], symbols[:, part]
        old = found[:, place]
        seen[part], hits[part] = (~old).sum(0), (~old & (now != 1)).sum(0)
        finer[part], upper[part] = old.sum(0), (old & (now == 2)).sum(0)
        found[:, place] |= now != 1
    chance = np.zeros_like(seen)
    for plane in np.unique(prior.plane):
        here = prior.plane == plane
        ones = np.ones(min(WINDOW, int(here.sum())))
        smooth = (np.convolve(hits[here], ones, "same") + 0.1) / (np.convolve(seen[here], ones, "same") + 1)
        chance[here] = (hits[here] + SHRINK * smooth) / (seen[here] + SHRINK)
    chance = chance.clip(1e-5, 1 - 1e-5)
    odds = (LOGIT * np.log(chance / (1 - chance))).round().astype(np.int16)
    high = ((upper + 30) / (finer + 64) * TOTAL).round().clip(1, TOTAL - 2)
    return odds, high.astype(np.uint16)


def _events(prior: PlanePrior, symbols: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Features, log odds of the position and outcome of every digit of a coefficient not significant before."""
    known = Known(prior, len(symbols))
    features, odds, hits = [], [], []
    for part in prior.parts:
        fresh = ~known.significant(part)
        features.append(known.features(part)[fresh].astype(np.int16))
        odds.append(np.broadcast_to(prior.odds[part], fresh.shape)[fresh])
        hits.append((symbols[:, part] != 1)[fresh])
        known.update(part, symbols[:, part])
    return (torch.from_numpy(np.concatenate(x)) for x in (features, odds, hits))  # type: ignore[return-value]


@torch.enable_grad()
def _network(features: Tensor, odds: Tensor, hits: Tensor) -> dict[str, np.ndarray]:
    """Fit the network by gradient descent on the code length, and round it."""
    generator = torch.Generator().manual_seed(0)
    some = features[torch.randint(len(features), (1 << 16,), generator=generator)].float() / UNIT
    mean, spread = some.mean(0), some.std(0).clamp_min(0.05)
    first = torch.randn(10, HIDDEN, generator=generator) * 10**-0.5
    weights = [first, torch.zeros(HIDDEN), torch.zeros(HIDDEN), torch.zeros(())]
    for w in weights:
        w.requires_grad_()
    steps = min(max(len(features) // 2000, 200), 3000)
    optimiser = torch.optim.Adam(weights, lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-2, steps)
    for _ in range(steps):
        chosen = torch.randint(len(features), (BATCH,), generator=generator)
        x = (features[chosen].float() / UNIT - mean) / spread
        logits = odds[chosen] / LOGIT + (x @ weights[0] + weights[1]).relu() @ weights[2] + weights[3]
        loss = F.binary_cross_entropy_with_logits(logits, hits[chosen].float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    w1, b1, w2, b2 = (w.detach() for w in weights)
    w1 = w1 / spread[:, None]
    bias = torch.cat([b1 - mean @ w1, b2[None]])
    whole = {"first": w1 * 1024, "bias": bias * 1024 * UNIT, "last": w2 * 1024}
    return {name: value.round().to(torch.int32).numpy() for name, value in whole.items()}


def _occurrences(place: np.ndarray) -> np.ndarray:
    """How often each entry occurred before, (S,): the plane of a digit, as those of a coefficient are in order."""
    order = np.argsort(place, kind="stable")
    grouped = place[order]
    start = np.searchsorted(grouped, grouped)
    result = np.empty_like(place)
    result[order] = np.arange(len(place)) - start
    return result


def _neighbours(used: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Places among `used` around each, C where there is none, (C, 42).

    4 near ones, 4 diagonal, 16 two steps away, the 2 of the other colours, 16 around those.
    """
    height, width = size
    where = np.full((3, height + 4, width + 4), len(used))
    colour, row, column = np.unravel_index(used, (3, height, width))
    where[colour, row + 2, column + 2] = np.arange(len(used))
    steps = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    rings = [[s for s in steps if s[0] ** 2 + s[1] ** 2 == 1], [s for s in steps if abs(s[0] * s[1]) == 1]]
    far = [s for s in steps if max(map(abs, s)) == 2]

    def at(turn: int, step: tuple[int, int]) -> np.ndarray:
        found: np.ndarray = where[(colour + turn) % 3, row + 2 + step[0], column + 2 + step[1]]
        return found

    own = [at(0, s) for s in (*rings[0], *rings[1], *far)]
    others = [at(c, (0, 0)) for c in (1, 2)] + [at(c, s) for c in (1, 2) for s in (*rings[0], *rings[1])]
    return np.stack(own + others, 1)
