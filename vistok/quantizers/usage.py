"""Which ids are in use: a sliding window over training, global over processes, padding excluded."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.distributed import all_stack, all_sum, world_size

LARGEST_TABLE = 2**22
"""Vocabularies above this are counted by sorting the window, not by a table of all ids."""

Function = TypeVar("Function", bound=Callable[..., Any])


def _outside_graphs(function: Function) -> Function:
    """`torch.compiler.disable`, applied only while something is compiled: it imports a compiler that takes seconds."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


class UsageTracker:
    """Sliding-window statistics of training ids.

    Every forward keeps a copy of its ids (padding as -1) and lets the oldest go. Every `every` forwards the window is
    summarised, over all processes; between two summaries the last one is returned. Plain tensors, neither
    parameters nor buffers: a state dict does not know about them.

    Statistics, each a scalar, mean over groups:
        usage: Share of the vocabulary that occurs in the window (vocabularies up to 2^22).
        perplexity: exp of the entropy of the ids in the window.
        dead_age: Forwards since the longest unused id was last seen, from the `every`-th forward on.
        bit_balance: Smallest 2 min(p, 1 - p) over the bits of the ids, 1 is balanced, 0 a constant bit; for `bitwise`
            quantizers.

    Args:
        vocab_sizes: Ids per group.
        window: Positions per process in the window; None for 8 per id, between 2^16 and 2^20.
        every: Forwards between two summaries.
        bitwise: The bits of an id are independent channels; vocabularies are powers of two.
    """

    def __init__(
        self, vocab_sizes: tuple[int, ...], *, window: int | None = None, every: int = 20, bitwise: bool = False
    ) -> None:
        self.bitwise = bitwise
        self.vocab_sizes = vocab_sizes
        self.window = window if window is not None else min(max(8 * max(vocab_sizes), 2**16), 2**20)
        self.every = every
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.forwards = 0
        self._chunks: deque[Tensor] = deque()  # (rows, G) each, together at most the window
        self._held = self._unmarked = 0
        self._table: Tensor | None = None  # counts of the window, group by group: padding, then every id
        self._changes: list[tuple[Tensor, int]] = []  # rows that are not in the table yet, or still in it (-1)
        self._seen: list[Tensor] = []
        self._last: dict[str, Tensor] = {}

    @torch.no_grad()
    @_outside_graphs
    def update(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Enter the ids of one training forward.

        Args:
            ids: (B, N) or (B, N, G) int64.
            mask: True where a position counts, (B, N).

        Returns:
            The latest summary. Every process has to call this equally often: summaries communicate.
        """
        self._keep(ids, mask)
        if self.forwards % self.every == 0:
            self._last = self.summary()
        self.forwards += 1
        if self.forwards % self.every == 0 and max(self.vocab_sizes) <= LARGEST_TABLE:
            self._mark_seen()
            self._last["dead_age"] = self.forwards - torch.stack([seen.amin() for seen in self._seen]).amin().float()
        return dict(self._last)

    def _keep(self, ids: Tensor, mask: Tensor | None) -> None:
        rows = self._as_rows(ids, mask)[-self.window :]
        if self._chunks and self._chunks[-1].device != rows.device:
            self._chunks.clear()
            self._held, self._table, self._changes, self._seen = 0, None, [], []
        self._chunks.append(rows)
        self._held += len(rows)
        self._unmarked = min(self._unmarked + len(rows), self.window)
        self._changes.append((rows, 1))
        while (excess := self._held - self.window) > 0:
            oldest = self._chunks.popleft()
            gone, left = oldest[:excess], oldest[excess:]
            if len(left):
                self._chunks.appendleft(left)
            self._held -= len(gone)
            self._changes.append((gone, -1))

    def _as_rows(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N) or (B, N, G) as (B * N, G), -1 for padding; always a copy."""
        small = torch.int32 if max(self.vocab_sizes) <= 2**31 else torch.int64
        rows = ids.detach().reshape(-1, len(self.vocab_sizes)).to(small, copy=True)
        return rows if mask is None else torch.where(mask.reshape(-1, 1), rows, -1)

    def counts(self) -> list[Tensor]:
        """Occurrences in the window, over all processes, one tensor a group.

        A table of all ids (vocab,), or, while the window holds fewer positions or if the vocabulary is above 2^22, the
        counts of the distinct ids that occur.
        """
        largest, alone = max(self.vocab_sizes), world_size() == 1
        if largest > LARGEST_TABLE or (alone and self._held < largest // 8):
            self._table, self._changes = None, []
            rows = self._rows(self.window)
            return [self._distinct(rows[:, group]) for group in range(len(self.vocab_sizes))]
        tables = all_sum(self._tabled()).long().split([v + 1 for v in self.vocab_sizes])
        return [t[1:][t[1:] > 0] if alone and self._held < len(t) - 1 else t[1:] for t in tables]

    def _tabled(self) -> Tensor:
        """The table of counts, brought up to date: what a summary costs then grows with what is new."""
        if self._table is None:
            rows = self._rows(self.window)
            size = sum(self.vocab_sizes) + len(self.vocab_sizes)
            self._table, self._changes = torch.zeros(size, dtype=torch.int32, device=rows.device), [(rows, 1)]
        places = [0, *(v + 1 for v in self.vocab_sizes[:-1])]
        starts = torch.tensor(places, device=self._table.device).cumsum(0) + 1
        for times in (1, -1):
            changed = [rows for rows, sign in self._changes if sign == times]
            if changed:
                at = (torch.cat(changed) + starts).reshape(-1)
                self._table.index_add_(0, at, torch.full_like(at, times, dtype=torch.int32))
        self._changes = []
        return self._table

    def _rows(self, last: int) -> Tensor:
        """The `last` newest rows of the window, (rows, G)."""
        if not self._chunks:
            return torch.empty((0, len(self.vocab_sizes)), dtype=torch.int64)
        rows, missing = [], last
        for chunk in reversed(self._chunks):
            rows.append(chunk[max(0, len(chunk) - missing) :])
            missing -= len(rows[-1])
            if missing <= 0:
                break
        return torch.cat(rows)

    def _distinct(self, column: Tensor) -> Tensor:
        """Counts of the distinct ids of a column over all processes, by sorting."""
        if world_size() > 1:  # padded to the window: equal in size on every process
            column = all_stack(F.pad(column, (0, self.window - len(column)), value=-1)).reshape(-1)
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
        if self.bitwise:
            found["bit_balance"] = self._bit_balance()
        return found

    @torch.no_grad()
    def ages(self) -> list[Tensor]:
        """Forwards since each id was last seen, one table (vocab,) a group; for the report's plot.

        At the resolution of the summaries; an id never seen is as old as the run. Empty above 2^22 ids.
        """
        return [self.forwards - s for s in self._seen]

    def _mark_seen(self) -> None:
        recent = self._rows(self._unmarked)
        self._unmarked = 0
        if not self._seen:
            self._seen = [torch.zeros(v, dtype=torch.int32, device=recent.device) for v in self.vocab_sizes]
        for group, (seen, size) in enumerate(zip(self._seen, self.vocab_sizes)):
            if world_size() == 1:
                seen[recent[recent[:, group] >= 0, group].long()] = self.forwards
            else:
                seen[all_sum(torch.bincount(recent[:, group] + 1, minlength=size + 1)[1:]) > 0] = self.forwards

    def _bit_balance(self) -> Tensor:
        rows = self._rows(self.window)
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
    found: Tensor = (-(p * p.clamp_min(1e-30).log()).sum()).exp()  # several times as fast as torch.special.entr
    return found
