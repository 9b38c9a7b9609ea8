"""The loader: which samples make up a step, read ahead of time, the same for any number of processes and workers."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vistok.data.augment import Augment
from vistok.data.base import Batch, Dataset, Drawn, Sample, TokenBatch, TokenDataset, TokenRows, keyed

if TYPE_CHECKING:
    from PIL.Image import Image


class DataError(ValueError):
    """A data set that cannot be trained on."""


class Order:
    """Which sample stands at a position: one shuffled pass over the data set after another, keyed by (seed, epoch)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, position: int, shift: int = 0) -> int:
        """Index of the sample at a position; `shift` takes a later one of the same pass (for broken samples)."""
        epoch, place = divmod(position, self.count)
        if epoch not in self._epochs:
            if len(self._epochs) > 2:
                self._epochs.clear()
            self._epochs[epoch] = keyed(self.seed, "order", epoch).permutation(self.count)
        return int(self._epochs[epoch][(place + shift) % self.count])


class Cache:
    """Decoded pictures in memory, up to a number of bytes; filled until full, never emptied."""

    def __init__(self, megabytes: float) -> None:
        self.free = int(megabytes * 2**20)
        self._samples: dict[int, Sample] = {}

    def read(self, dataset: Dataset, index: int) -> Sample:
        """Sample `index`, from memory if it is there."""
        found = self._samples.get(index)
        if found is None:
            found = dataset.read(index)
            size = found.picture.width * found.picture.height * 4  # Pillow keeps RGB in four bytes
            if size <= self.free:
                self.free -= size
                self._samples[index] = found
        return found


@dataclass(frozen=True)
class Raw:
    """What a worker hands over: everything of a `Batch`, pictures still uint8 (B, H, W, 3)."""

    pictures: np.ndarray
    positions: np.ndarray
    text: tuple[str, ...] | None
    labels: np.ndarray | None
    skipped: tuple[tuple[str, str], ...]  # name and reason


class Reader:
    """Positions in, samples out. What it gives depends on the data set, the seed and the positions only."""

    def __init__(self, dataset: Dataset, augment: Augment, *, seed: int, cache_mb: float) -> None:
        self.dataset, self.augment, self.seed = dataset, augment, seed
        self.order = Order(len(dataset), seed)
        self.cache = Cache(cache_mb)
        self.broken: dict[int, str] = {}

    def __getitem__(self, positions: np.ndarray) -> Raw:
        """Read the samples at these positions; a broken one is replaced by the next of the same pass."""
        skipped: list[tuple[str, str]] = []
        samples = [self._sample(int(p), skipped) for p in positions]
        pictures = np.stack([self._cut(s.picture, int(p)) for s, p in zip(samples, positions)])
        text = None if samples[0].text is None else tuple(s.text or "" for s in samples)
        labels = None if samples[0].label is None else np.array([s.label for s in samples])
        return Raw(pictures, positions, text, labels, tuple(skipped))

    def batch(self, raw: Raw, device: torch.device) -> Batch:
        """What a worker handed over, on the device."""
        pictures = torch.from_numpy(raw.pictures).to(device)  # sent as uint8: a quarter of the bytes
        images = pictures.permute(0, 3, 1, 2).contiguous().float().div_(255)  # (B, 3, H, W)
        labels = None if raw.labels is None else torch.from_numpy(raw.labels).to(device)
        names = tuple(name for name, _ in raw.skipped)
        return Batch(images, torch.from_numpy(raw.positions), self.seed, raw.text, labels, names)

    def _cut(self, picture: Image, position: int) -> np.ndarray:
        return self.augment(picture, keyed(self.seed, "augment", position))

    def _sample(self, position: int, skipped: list[tuple[str, str]]) -> Sample:
        for shift in range(len(self.dataset)):
            index = self.order(position, shift)
            if index not in self.broken:
                try:
                    return self.cache.read(self.dataset, index)
                except (OSError, ValueError) as err:  # a broken file: passed over, counted and named by the loader
                    self.broken[index] = " ".join(str(err).split()) or type(err).__name__
            skipped.append((self.dataset.name(index), self.broken[index]))
        first = next(iter(self.broken.values()))
        raise DataError(f"None of the {len(self.dataset)} samples of the data set can be read. The first: {first}")


class TokenReader:
    """As `Reader`, for data sets of tokens: nothing is cut, and one of a picture's views is drawn for its position."""

    def __init__(self, dataset: TokenDataset, *, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.order = Order(len(dataset), seed)

    def __getitem__(self, positions: np.ndarray) -> TokenRows:
        """Rows of the samples at these positions."""
        draws = [int(keyed(self.seed, "view", int(p)).integers(2**31)) for p in positions]
        return self.dataset.gather([self.order(int(p)) for p in positions], draws, positions)

    def batch(self, rows: TokenRows, device: torch.device) -> TokenBatch:
        """What a worker handed over, on the device."""
        labels = None if rows.labels is None else torch.from_numpy(rows.labels).to(device)
        tokens = self.dataset.tokens_of(rows).to(device)
        return TokenBatch(tokens, torch.from_numpy(rows.positions), self.seed, rows.text, labels)


class Loader:
    """Batches of consecutive steps, prepared in the background.

    Step s of the run is made of positions s * global_batch .. (s + 1) * global_batch - 1. Each process takes its
    part of them, cut into `accumulation` batches; so the set of samples of a step, and each sample's crop, do not
    depend on how many processes or workers there are, and a run continues at any step without reading what was before.

    Args:
        dataset: Where samples come from: pictures, or tokens (`TokenBatch`).
        augment: Crops and flips; None for tokens, whose crops and flips were made with them.
        seed: Keys the order and the crops.
        global_batch: Samples per step over all processes.
        accumulation: Batches per step of one process.
        rank: This process.
        world: Number of processes.
        workers: Worker processes; 0 prepares batches in a thread, which is enough for small pictures.
        prefetch: Batches prepared ahead (per worker).
        cache_mb: Memory for decoded pictures, of each worker.
        device: Where batches go.

    Attributes:
        waited: Seconds spent waiting for data so far.
        skipped: Names of the broken samples met so far, with how often each was passed over.

    Raises:
        DataError: The global batch cannot be divided among processes and accumulation.
    """

    def __init__(
        self,
        dataset: Dataset | TokenDataset,
        augment: Augment | None,
        *,
        seed: int,
        global_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        cache_mb: float = 256,
        device: torch.device | str = "cpu",
    ) -> None:
        if global_batch % (world * accumulation):
            raise DataError(
                f"A global batch of {global_batch} cannot be divided among {world} processes x {accumulation} batches. "
                f"Choose a multiple of {world * accumulation}."
            )
        self.reader: Reader | TokenReader
        if isinstance(dataset, TokenDataset):
            self.reader = TokenReader(dataset, seed=seed)
        elif augment is None:
            raise DataError("A data set of pictures needs `augment`, which says how they are cut.")
        else:
            self.reader = Reader(dataset, augment, seed=seed, cache_mb=cache_mb)
        self.seed, self.global_batch, self.accumulation = seed, global_batch, accumulation
        self.rank, self.world = rank, world
        self.workers, self.prefetch, self.device = workers, prefetch, torch.device(device)
        self.waited = 0.0
        self.skipped: dict[str, int] = {}

    def positions(self, step: int) -> list[np.ndarray]:
        """Positions of this process's batches in one step."""
        share = self.global_batch // self.world
        first = step * self.global_batch + self.rank * share
        return np.split(np.arange(first, first + share), self.accumulation)

    def steps(self, start: int, stop: int) -> Iterator[list[Any]]:
        """The batches of steps start .. stop - 1, one list a step. Close the iterator to stop the background work."""
        wanted = (part for step in range(start, stop) for part in self.positions(step))
        ahead = Prefetch(self._read(wanted), self.prefetch)
        try:
            for _ in range(start, stop):
                began = time.perf_counter()
                raws = [next(ahead) for _ in range(self.accumulation)]
                self.waited += time.perf_counter() - began
                yield [self._batch(raw) for raw in raws]
        finally:
            ahead.close()

    def _read(self, wanted: Iterable[np.ndarray]) -> Iterator[Any]:
        if not self.workers:
            return (self.reader[positions] for positions in wanted)
        from torch.utils.data import DataLoader

        return iter(
            DataLoader(
                self.reader,  # type: ignore[arg-type]
                sampler=wanted,
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=self.prefetch,
                collate_fn=_unchanged,
                generator=torch.Generator(),  # its own, so that it draws nothing from the run's
            )
        )

    def _batch(self, raw: Any) -> Drawn:
        for name, why in getattr(raw, "skipped", ()):
            if name not in self.skipped:
                reason = why if name in why else f"{name}: {why}"
                warnings.warn(f"Skipped from now on: {reason}", stacklevel=2)
            self.skipped[name] = self.skipped.get(name, 0) + 1
        return self.reader.batch(raw, self.device)


def _unchanged(raw: Any) -> Any:
    return raw


class Prefetch:
    """Runs an iterator in a thread, a few items ahead; an exception comes out where its item would have been."""

    _END = object()

    def __init__(self, items: Iterator[Any], depth: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(max(depth, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="vistok-data", daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(self._END)
        except BaseException as err:  # handed to the thread that waits for the item
            self._put(err)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> Any:
        item = self._queue.get()
        if item is self._END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread; it ends after the item it is working on."""
        self._stop.set()
        self._thread.join(timeout=10)
