"""Pictures of a data set, shard after shard, read ahead of the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vistok.data.base import Dataset, Sample
from vistok.data.loader import Prefetch
from vistok.image import Preprocess
from vistok.tokenize.views import Views


@dataclass(frozen=True)
class Piece:
    """A few consecutive samples of one shard: what a worker is asked for.

    Attributes:
        shard: Number of the shard.
        first: The first sample.
        stop: The one after the last.
        last: Whether the shard ends here.
    """

    shard: int
    first: int
    stop: int
    last: bool


@dataclass(frozen=True)
class Part:
    """What became of a piece.

    Attributes:
        piece: The piece.
        pictures: All views of the samples that could be read, uint8 (n, V, H, W, 3).
        index: Their numbers in the data set.
        keys: Their names.
        text: Their captions, None where there is none.
        labels: Their classes, None where there is none.
        skipped: Name of a sample that could not be read -> why.
    """

    piece: Piece
    pictures: Tensor
    index: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    text: tuple[str | None, ...] = ()
    labels: tuple[int | None, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)


def pieces(shards: Sequence[int], count: int, shard_size: int, batch: int) -> list[Piece]:
    """The given shards of a data set of `count` samples, in pieces of at most `batch` samples."""
    found = []
    for shard in shards:
        first, stop = shard * shard_size, min((shard + 1) * shard_size, count)
        starts = range(first, stop, batch)
        found += [Piece(shard, s, min(s + batch, stop), last=s == starts[-1]) for s in starts]
    return found


class Reader:
    """Pieces in, parts out; what it gives depends on the data set and the settings alone."""

    def __init__(self, dataset: Dataset, preprocess: Preprocess, views: Views) -> None:
        self.dataset, self.preprocess, self.views = dataset, preprocess, views

    def __getitem__(self, piece: Piece) -> Part:
        """Read, crop and mirror; a sample that cannot be read is left out and named."""
        pictures: list[np.ndarray] = []
        kept: list[tuple[int, str, Sample]] = []
        skipped: dict[str, str] = {}
        for index in range(piece.first, piece.stop):
            name = self.dataset.name(index)
            try:
                sample = self.dataset.read(index)
                pictures.append(self.views(sample.picture, self.preprocess))
            except (OSError, ValueError) as err:
                skipped[name] = (str(err).strip() or type(err).__name__).split("\n", 1)[0]
                continue
            kept.append((index, name, sample))
        stacked = np.stack(pictures) if pictures else np.zeros((0, len(self.views), *self.preprocess.size, 3), np.uint8)
        return Part(
            piece,
            torch.from_numpy(stacked),
            index=tuple(index for index, *_ in kept),
            keys=tuple(name for _, name, _ in kept),
            text=tuple(sample.text for *_, sample in kept),
            labels=tuple(sample.label for *_, sample in kept),
            skipped=skipped,
        )


@contextmanager
def ahead(reader: Reader, wanted: Sequence[Piece], *, workers: int, depth: int = 4) -> Iterator[Iterator[Part]]:
    """The parts in order, prepared in a thread or by worker processes while the encoder works."""
    prefetch = Prefetch(_parts(reader, wanted, workers, depth), depth)
    try:
        yield prefetch
    finally:
        prefetch.close()


def _parts(reader: Reader, wanted: Sequence[Piece], workers: int, depth: int) -> Iterator[Part]:
    if not workers:
        return (reader[piece] for piece in wanted)
    from torch.utils.data import DataLoader

    return iter(
        DataLoader(
            reader,  # type: ignore[arg-type]
            sampler=wanted,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=depth,
            collate_fn=_unchanged,
        )
    )


def _unchanged(part: Part) -> Part:
    return part
