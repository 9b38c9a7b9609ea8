"""Which pictures to show: the worst, the median and the best of an evaluation, kept while it streams by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vistok.image import to_uint8


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One picture and its reconstruction.

    Attributes:
        name: File name or index.
        original: uint8, (3, H, W).
        reconstruction: uint8, (3, H, W).
        values: Metric name -> its value for this picture.
        note: A further line, for instance the caption or the number of tokens.
    """

    name: str
    original: Tensor
    reconstruction: Tensor
    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(cls, name: str, original: Tensor, reconstruction: Tensor, *, note: str = "", **values: float) -> Example:
        """From float pictures in [0, 1]."""
        return cls(
            name=name,
            original=to_uint8(original.detach().float()).cpu(),
            reconstruction=to_uint8(reconstruction.detach().float()).cpu(),
            values=values,
            note=note,
        )


class Gallery:
    """Keeps few examples of many: the worst, the best, and a sample from which the median ones are taken.

    The choice depends on names and values alone, not on the order, the batches or the processes.

    Args:
        metric: Name of the value that ranks.
        higher_is_better: Its direction.
        keep: Examples per group.
        sample: Examples kept to look for the median in; a set of at most this many is kept whole.
    """

    def __init__(self, metric: str = "psnr", *, higher_is_better: bool = True, keep: int = 4, sample: int = 64) -> None:
        self.metric = metric
        self.sign = 1.0 if higher_is_better else -1.0
        self.keep = keep
        self.sample = sample
        self.values: list[float] = []
        self._worst: list[Example] = []
        self._best: list[Example] = []
        self._sample: list[Example] = []

    def add(self, example: Example) -> None:
        """Enter an example.

        Raises:
            KeyError: It has no value of the ranking metric.
        """
        self.values.append(self._score(example))
        self._enter([example])

    def merge(self, others: Iterable[Gallery]) -> Gallery:
        """Take over what other processes kept; returns itself."""
        for other in others:
            self.values += other.values
            self._enter([*other._worst, *other._best], sample=False)
            self._enter(other._sample)
        return self

    def groups(self) -> dict[str, list[Example]]:
        """`worst`, `median` and `best`, each at most `keep` examples, no example twice."""
        if not self.values:
            return {"worst": [], "median": [], "best": []}
        middle = sorted(self.values)[len(self.values) // 2]
        near = sorted(self._sample, key=lambda e: (abs(self._score(e) - middle), e.name))
        keep = min(self.keep, max(1, len(self.values) // 3))
        worst, best = self._worst[:keep], self._best[:keep]
        taken = {e.name for e in (*worst, *best)}
        median = [e for e in near if e.name not in taken][:keep]
        if len(self.values) < 3:
            best = [e for e in best if e.name not in {w.name for w in worst}]
        return {"worst": worst, "median": sorted(median, key=self._rank), "best": best}

    def sampled(self) -> list[Example]:
        """The sample, in the order of names: all examples of a small set."""
        return sorted(self._sample, key=lambda e: e.name)

    def _enter(self, examples: list[Example], sample: bool = True) -> None:
        self._worst = _unique(sorted([*self._worst, *examples], key=self._rank))[: self.keep]
        self._best = _unique(sorted([*self._best, *examples], key=self._rank)[::-1])[: self.keep]
        if sample:
            self._sample = _unique(sorted([*self._sample, *examples], key=_shuffled))[: self.sample]

    def _score(self, example: Example) -> float:
        return self.sign * example.values[self.metric]

    def _rank(self, example: Example) -> tuple[float, str]:
        return self._score(example), example.name


def _shuffled(example: Example) -> bytes:
    """A sort key that looks random and is a function of the name alone."""
    return hashlib.sha256(example.name.encode()).digest()


def _unique(examples: list[Example]) -> list[Example]:
    return list({e.name: e for e in examples}.values())
