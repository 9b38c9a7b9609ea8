"""What every data set is, and the randomness keyed by position that makes training repeatable."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vistok.image import save_png
from vistok.tokens import Tokens

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One picture of a data set.

    Attributes:
        picture: 8-bit RGB, upright.
        text: Caption, None if the data set has none.
        label: Class index, None if the data set has none.
    """

    picture: Image
    text: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class TokenSample:
    """One picture of a data set of tokens.

    Attributes:
        tokens: Its tokens, one row for every view (crop, mirror image) that was made of the picture.
        key: What the picture was called in the data set it comes from.
        text: Caption, None if the data set has none.
        label: Class index, None if the data set has none.
    """

    tokens: Tokens
    key: str
    text: str | None = None
    label: int | None = None


@runtime_checkable
class Dataset(Protocol):
    """A numbered collection of pictures. Reading is random access, so a position in an epoch is just a number.

    A registered builder (kind `dataset`) takes keyword-only arguments and needs no `image_size`, crop or flip: the
    loader owns those. Building it must be cheap; `read` may raise `OSError` or `ValueError` for a broken sample.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, index: int) -> Sample:
        """Sample `index`, 0 .. len - 1."""

    def name(self, index: int) -> str:
        """What to call sample `index` in a message; stable between runs."""


@dataclass(frozen=True)
class TokenRows:
    """One view of several pictures, as a worker hands them over.

    Attributes:
        values: Ids in the type they are stored in, (B, N) or (B, N, G), or codes (B, N, D).
        lengths: Valid tokens of each row, (B,).
        positions: Position of each sample in the run, int64, (B,).
        text: Captions, None if the data set has none.
        labels: Class indices, int64, (B,), None if the data set has none.
    """

    values: Tensor
    lengths: Tensor
    positions: np.ndarray
    text: tuple[str, ...] | None = None
    labels: np.ndarray | None = None


@runtime_checkable
class TokenDataset(Protocol):
    """A numbered collection of tokenised pictures; a registered builder like `Dataset`."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, index: int) -> TokenSample:
        """Sample `index`, 0 .. len - 1."""

    def name(self, index: int) -> str:
        """What to call sample `index` in a message; stable between runs."""

    def gather(self, indices: Sequence[int], draws: Sequence[int], positions: np.ndarray) -> TokenRows:
        """Samples of a batch; of a sample with V views the one numbered draw % V."""

    def tokens_of(self, rows: TokenRows) -> Tokens:
        """The rows as tokens of their tokenizer."""


class PictureFiles:
    """What data sets of picture files share: the files, their number and their names.

    Attributes:
        files: The pictures, in order.
    """

    files: list[Path]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.files)

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])


def files_of(dataset: Dataset) -> Sequence[Path] | None:
    """The picture files behind a data set, None if its pictures are not files."""
    return getattr(dataset, "files", None)


def captions_of(dataset: Dataset) -> dict[Path, str] | None:
    """The caption of every picture file behind a data set that can be read, None if it has no captions."""
    found: dict[Path, str] = {}
    for index, file in enumerate(files_of(dataset) or ()):
        try:
            text = dataset.read(index).text
        except (OSError, ValueError):  # what reads the files for their pictures names it
            continue
        if text is None:
            return None
        found[file] = text
    return found or None


def gives_text(dataset: Dataset | TokenDataset) -> bool:
    """Whether samples have captions, judged by the first that can be read."""
    for index in range(len(dataset)):
        try:
            return dataset.read(index).text is not None
        except (OSError, ValueError):  # a broken one, which the loader names
            continue
    return False


def write_files(dataset: Dataset, folder: Path) -> tuple[list[Path], dict[Path, str] | None, dict[str, str]]:
    """Write the pictures of a data set that has no files (shards, tables) as PNG files, `00000000.png` and so on.

    Args:
        dataset: Any data set of pictures.
        folder: Where to; pictures that it holds already are removed first.

    Returns:
        The files in order, the caption of each (None if the data set has none), and name -> reason of every sample that
        cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    texts: dict[Path, str | None] = {}
    broken = {}
    for index in range(len(dataset)):
        try:
            sample = dataset.read(index)
        except (OSError, ValueError) as err:
            broken[dataset.name(index)] = " ".join(str(err).split())
            continue
        file = folder / f"{index:08d}.png"
        save_png(sample.picture, file)
        texts[file] = sample.text
    has_text = any(text is not None for text in texts.values())
    return list(texts), {file: text or "" for file, text in texts.items()} if has_text else None, broken


def fingerprint(dataset: Dataset) -> str:
    """8 hex digits over the names and the order of all samples: equal means position p is the same sample.

    A data set that knows more of itself has it as an attribute `fingerprint`.
    """
    own = getattr(dataset, "fingerprint", None)
    if own is not None:
        return str(own)
    code = zlib.crc32(str(len(dataset)).encode())
    for index in range(len(dataset)):
        code = zlib.crc32(dataset.name(index).encode(), code)
    return f"{code:08x}"


def keyed(seed: int, stream: str, *position: int) -> np.random.Generator:
    """A random generator that is a function of its arguments alone (Philox, counter-based).

    Args:
        seed: The run's seed.
        stream: What the numbers are for, e.g. `order`: different names give independent numbers.
        *position: Up to three counters, e.g. the sample's position in the run.
    """
    key = np.array([seed, zlib.crc32(stream.encode())], dtype=np.uint64)
    counter = np.zeros(4, dtype=np.uint64)  # the first word counts the draws, the others are ours
    counter[1 : 1 + len(position)] = position
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Drawn:
    """What belongs to the samples of a batch: random numbers keyed by their positions.

    Attributes:
        positions: Position of each sample in the run (step * global batch + place in the batch), int64, (B,), on the
            CPU. What is drawn per sample is keyed by it, never by process or worker.
        seed: The run's seed.
    """

    positions: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def device(self) -> torch.device:
        """Where the batch is."""
        raise NotImplementedError

    def uniform(self, stream: str, count: int = 1) -> Tensor:
        """Numbers in [0, 1) per sample, float64, (B, count), keyed by (seed, stream, position)."""
        rows = [keyed(self.seed, stream, int(p)).random(count) for p in self.positions]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers per sample, float32, (B, *shape), keyed by (seed, stream, position)."""
        rows = [keyed(self.seed, stream, int(p)).standard_normal(shape, dtype=np.float32) for p in self.positions]
        return torch.from_numpy(np.stack(rows)).to(self.device)


@dataclass(frozen=True)
class Batch(Drawn):
    """Pictures of one forward pass.

    Attributes:
        images: Float RGB in [0, 1], (B, 3, H, W).
        positions: See `Drawn`.
        seed: The run's seed.
        text: Captions, None if the data set has none.
        labels: Class indices, int64, (B,), None if the data set has none.
        skipped: Names of broken samples that were passed over for this batch.
    """

    images: Tensor
    positions: Tensor
    seed: int = 0
    text: tuple[str, ...] | None = None
    labels: Tensor | None = None
    skipped: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the pictures are."""
        return self.images.device


@dataclass(frozen=True)
class TokenBatch(Drawn):
    """Tokens of one forward pass, for steps that read tokens instead of pictures.

    Attributes:
        tokens: One row per sample.
        positions: See `Drawn`.
        seed: The run's seed.
        text: Captions, None if the data set has none.
        labels: Class indices, int64, (B,), None if the data set has none.
    """

    tokens: Tokens
    positions: Tensor
    seed: int = 0
    text: tuple[str, ...] | None = None
    labels: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.tokens.lengths.device
