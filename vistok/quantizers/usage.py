"""Which ids are in use: a sliding window over training, global over processes, padding excluded."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.quantizers.distributed import all_stack, all_sum, world_size

LARGEST_TABLE = 2**22
"""Vocabularies above this are counted by sorting the window, not by a table of all ids."""


class UsageTracker:
    """Sliding-window statistics of training ids.

    Every forward writes its ids into a ring (padding as -1), which costs a copy of the ids. Every `every` forwards the
    ring is summarised, over all processes; between two summaries the last one is returned. Plain tensors, neither
    parameters nor buffers: a state dict does not know about them.

    Statistics, each a scalar, mean over groups:
        usage: Share of the vocabulary that occurs in the window (vocabularies up to 2^22).
        perplexity: exp of the entropy of the ids in the window.
        dead_age: Forwards since the longest unused id was last seen, from the `every`-th forward on.
        bit_balance: Smallest 2 min(p, 1 - p) over the bits of the ids, 1 is balanced, 0 a constant bit; for
            vocabularies of a power of two.

    Args:
        vocab_sizes: Ids per group.
        window: Positions per process in the window; None for 8 per id, between 2^16 and 2^20.
        every: Forwards between two summaries.
    """

    def __init__(self, vocab_sizes: tuple[int, ...], *, window: int | None = None, every: int = 20) -> None:
        self.vocab_sizes = vocab_sizes
        self.window = window if window is not None else min(max(8 * max(vocab_sizes), 2**16), 2**20)
        self.every = every
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.forwards = 0
        self._ring: Tensor | None = None
        self._written = self._marked = 0
        self._seen: list[Tensor] = []
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Enter the ids of one training forward.

        Args:
            ids: (B, N) or (B, N, G) int64; G may be smaller than the number of groups (dropped residual levels).
            mask: True where a position counts, (B, N).

        Returns:
            The latest summary. Every process has to call this equally often: summaries communicate.
        """
        self._write(ids, mask)
        if self.forwards % self.every == 0:
            self._last = self.summary()
        self.forwards += 1
        if self.forwards % self.every == 0 and max(self.vocab_sizes) <= LARGEST_TABLE:
            self._mark_seen()
            self._last["dead_age"] = torch.stack([age.amax() for age in self.ages()]).amax().float()
        return dict(self._last)

    def _write(self, ids: Tensor, mask: Tensor | None) -> None:
        groups = len(self.vocab_sizes)
        rows = ids.detach().reshape(-1, ids.shape[-1] if ids.ndim == 3 else 1)
        if mask is not None:
            rows = torch.where(mask.reshape(-1, 1), rows, -1)
        rows = rows[-self.window :]
        ring = self._ring
        if ring is None or ring.device != rows.device:
            ring = torch.full((self.window, groups), -1, dtype=torch.int64, device=rows.device)
            self._ring, self._written, self._marked, self._seen = ring, 0, 0, []
        start, width = self._written % self.window, rows.shape[1]
        head = min(len(rows), self.window - start)
        for at, part in ((start, rows[:head]), (0, rows[head:])):
            ring[at : at + len(part), :width] = part
            ring[at : at + len(part), width:] = -1
        self._written += len(rows)

    def counts(self) -> list[Tensor]:
        """Occurrences in the window, over all processes, one tensor a group.

        A table of all ids (vocab,), or, where that is smaller, the counts of the distinct ids that occur.
        """
        return [self._count(self._rows(self._written), group, sort=True) for group in range(len(self.vocab_sizes))]

    def _rows(self, last: int) -> Tensor:
        """The `last` newest rows of the ring, (rows, G)."""
        if self._ring is None:
            return torch.empty((0, len(self.vocab_sizes)), dtype=torch.int64)
        last = min(last, self.window)
        if last == self.window:
            return self._ring
        start, end = (self._written - last) % self.window, self._written % self.window
        return self._ring[start:end] if start <= end else torch.cat([self._ring[start:], self._ring[:end]])

    def _count(self, rows: Tensor, group: int, *, sort: bool) -> Tensor:
        size, column = self.vocab_sizes[group], rows[:, group]
        alone = world_size() == 1
        if size <= LARGEST_TABLE and not (sort and alone and len(column) < size):
            return all_sum(torch.bincount(column + 1, minlength=size + 1)[1:])
        if not alone:  # the whole ring: equal in size on every process
            assert self._ring is not None
            column = all_stack(self._ring[:, group]).reshape(-1)
        distinct, counts = torch.unique(column, return_counts=True)
        present: Tensor = counts[distinct >= 0]
        return present

    @torch.no_grad()
    def summary(self) -> dict[str, Tensor]:
        """The statistics of the window now. Communicates: call it on every process."""
        counts = self.counts()
        found = {"perplexity": torch.stack([_perplexity(c) for c in counts]).mean()}
        if max(self.vocab_sizes) <= LARGEST_TABLE:
            shares = [(c > 0).sum() / v for c, v in zip(counts, self.vocab_sizes)]
            found["usage"] = torch.stack(shares).mean()
        if all(v & (v - 1) == 0 and v > 1 for v in self.vocab_sizes):
            found["bit_balance"] = self._bit_balance()
        return found

    @torch.no_grad()
    def ages(self) -> list[Tensor]:
        """Forwards since each id was last seen, one table (vocab,) a group; for the report's plot.

        At the resolution of the summaries; an id never seen is as old as the run. Empty above 2^22 ids.
        """
        return [self.forwards - s for s in self._seen]

    def _mark_seen(self) -> None:
        recent = self._rows(self._written - self._marked)
        self._marked = self._written
        if not self._seen:
            self._seen = [torch.zeros(v, dtype=torch.int32, device=recent.device) for v in self.vocab_sizes]
        for group, seen in enumerate(self._seen):
            seen[self._count(recent, group, sort=False) > 0] = self.forwards

    def _bit_balance(self) -> Tensor:
        assert self._ring is not None
        rows = self._rows(self._written)
        valid = rows[:, :1] >= 0
        smallest = []
        total = all_sum(valid.sum()).clamp_min(1)
        for group, size in enumerate(self.vocab_sizes):
            column = torch.where(valid[:, 0], rows[:, group], 0)
            shifts = range(size.bit_length() - 1)
            ones = all_sum(torch.stack([((column >> s) & 1).sum() for s in shifts]))
            share = ones.float() / total
            smallest.append((2 * torch.minimum(share, 1 - share)).amin())
        return torch.stack(smallest).amin()


def _perplexity(counts: Tensor) -> Tensor:
    p = counts.float() / counts.sum().clamp_min(1)
    found: Tensor = torch.special.entr(p).sum().exp()
    return found
