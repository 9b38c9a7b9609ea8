"""State of one call. It lives on the cache, so it follows it into later steps and later calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vistok.compress.method import Method
from vistok.compress.reduction import take
from vistok.compress.trace import Trace
from vistok.compress.view import View
from vistok.plugins.layout import Columns

ATTRIBUTE = "_vistok_call"


@dataclass(kw_only=True)
class Stage:
    """The columns from a layer on."""

    layer: int
    columns: Columns


@dataclass(kw_only=True)
class Call:
    """One prompt and the steps after it.

    Attributes:
        depth: Layers of the language model.
        start: Columns of the uncompressed prompt.
        scope: What a budget counts over.
        stages: Shortened columns, by rising layer.
        evicted: Columns left in the cache of a layer where they differ from what entered it.
        prefill: The prompt is running through the layers.
        restore: Hand the last hidden states back at full length.
        row_mask: Query rows the method scores with, over the prompt, (B, L).
        rows: Largest number of rows in a sample.
        attention: Rows read at a layer and not used yet.
        received: Attention mass per key, by layer, for eviction.
        transitions: Accumulated token transitions over the prompt, (B, L).
        lengths: Cache length of every layer after the last forward.
        memo: What this forward has already computed.
        before: Tokens per sample of the caller's prompt, if it was shortened before the language model.
        before_sizes: Tokens of every image as the tower gave them, likewise.
        source: Column of the caller's prompt of every column here, (B, L), likewise.
    """

    depth: int
    start: Columns
    scope: str = "image"
    stages: list[Stage] = field(default_factory=list)
    evicted: dict[int, Columns] = field(default_factory=dict)
    prefill: bool = True
    restore: bool = False
    row_mask: Tensor | None = None
    rows: int = 0
    attention: dict[int, Tensor] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    transitions: Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    memo: dict[Any, Any] = field(default_factory=dict)
    before: list[int] | None = None
    before_sizes: list[list[int]] | None = None
    source: Tensor | None = None

    def columns_at(self, layer: int) -> Columns:
        """Columns that enter a layer at prefill."""
        found = self.start
        for stage in self.stages:
            if stage.layer <= layer:
                found = stage.columns
        return found

    def cached_at(self, layer: int) -> Columns:
        """Columns of the prompt in the cache of a layer."""
        return self.evicted.get(layer, self.columns_at(layer))

    def changed_at(self, layer: int) -> bool:
        """Whether a layer sees another sequence than the host believes."""
        return layer in self.evicted or any(stage.layer <= layer for stage in self.stages)

    def view(self, columns: Columns, *, layer: int = 0, stage: int = 0, hidden: Tensor | None = None) -> View:
        """The columns as a method sees them; under `scope="row"` all images of a sample count as one."""
        sizes, counts, segment, place = self.start.counts, columns.counts, columns.segment, columns.place
        sizes, counts = self.scoped(sizes), self.scoped(counts)
        if self.scope == "row":
            first = self.start.segment >= 0
            place = take(first.cumsum(1) - 1, columns.index).clamp_min(0)
            segment = segment.clamp_max(0)
        return View(
            index=columns.index,
            valid=columns.valid,
            segment=segment,
            place=place,
            protect=columns.protect,
            sizes=sizes,
            counts=counts,
            texts=columns.texts,
            layer=layer,
            stage=stage,
            hidden=hidden,
        )

    def scoped(self, counts: list[list[int]]) -> list[list[int]]:
        """Counts per image as the method sees them."""
        return [[sum(row)] if row else [] for row in counts] if self.scope == "row" else counts

    def row_columns(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """Where the query rows stand now: columns (B, R) and which of them exist (B, R)."""
        assert self.row_mask is not None
        mask = take(self.row_mask, columns.index) & columns.valid
        index = mask.byte().sort(dim=1, stable=True).indices[:, -self.rows :]
        return index, mask.gather(1, index)

    def counts_by_image(self, counts: list[list[int]], columns: Columns) -> list[list[int]]:
        """Counts of a decision per image, whatever scope it was taken in (one synchronisation under `row`)."""
        if self.scope != "row":
            return counts
        width = max((len(row) for row in columns.counts), default=0)
        if width < 2:
            return counts
        slots = columns.index.new_zeros(columns.index.shape[0], width)
        slots.scatter_add_(1, columns.segment.clamp_min(0), (columns.segment >= 0).long())
        return [row[: len(have)] for row, have in zip(slots.tolist(), columns.counts)]

    def trace(self) -> Trace:
        """What happened so far."""
        entering = [self.columns_at(layer) for layer in range(self.depth)]
        cached, filler = [], []
        prompt_slots = self.start.index.shape[1]
        steps = self.lengths[0] - self.cached_at(0).index.shape[1] if self.lengths else 0
        for layer, length in enumerate(self.lengths):
            columns = self.cached_at(layer)
            new = length - columns.index.shape[1]
            cached.append([n + new for n in columns.lengths])
            filler.append([columns.index.shape[1] - n for n in columns.lengths])
        last = entering[-1]
        place = last.index if self.source is None else take(self.source, last.index)
        assert prompt_slots >= last.index.shape[1]
        return Trace(
            entered=[columns.lengths for columns in entering],
            image=[[sum(row) for row in columns.counts] for columns in entering],
            cached=cached,
            filler=filler,
            steps=steps,
            prompt=self.start.lengths if self.before is None else self.before,
            images=self.start.counts if self.before_sizes is None else self.before_sizes,
            kept=[row[mask].cpu() for row, mask in zip(place, last.segment >= 0)],
        )


def active(method: Method, depth: int) -> bool:
    """Whether a method does anything inside the language model or its cache."""
    return bool(method.cuts(depth)) or bool(method.evicted_layers(depth))
