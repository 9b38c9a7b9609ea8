"""What every data set is, and the randomness keyed by position that makes training repeatable."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vistok.image import PictureError, to_pil

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


def files_of(dataset: Dataset) -> Sequence[Path] | None:
    """The picture files behind a data set, None if its pictures are not files."""
    return getattr(dataset, "files", None)


def captions_of(dataset: Dataset) -> dict[Path, str] | None:
    """The caption of every picture file behind a data set, None if it has no captions."""
    files = files_of(dataset)
    if not files or dataset.read(0).text is None:
        return None
    return {file: dataset.read(i).text or "" for i, file in enumerate(files)}


def decode(data: bytes, name: str) -> Image:
    """The bytes of a picture file as an upright 8-bit RGB picture.

    Raises:
        PictureError: Not a picture, damaged or too large; says which.
    """
    from PIL import Image as pillow

    try:
        with pillow.open(io.BytesIO(data)) as found:
            return to_pil(found)
    except Exception as err:  # Pillow's readers raise many types on damaged files, by format
        raise PictureError(f"{name} cannot be read as a picture: {err}") from err


def fingerprint(dataset: Dataset) -> str:
    """8 hex digits over the names and the order of all samples: equal means position p is the same sample."""
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


@dataclass(frozen=True)
class Batch:
    """Samples of one forward pass.

    Attributes:
        images: Float RGB in [0, 1], (B, 3, H, W).
        positions: Position of each sample in the run (step * global batch + place in the batch), int64, (B,), on the
            CPU. What is drawn per sample is keyed by it, never by process or worker.
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

    def __len__(self) -> int:
        return len(self.positions)

    def uniform(self, stream: str, count: int = 1) -> Tensor:
        """Numbers in [0, 1) per sample, float64, (B, count), keyed by (seed, stream, position)."""
        rows = [keyed(self.seed, stream, int(p)).random(count) for p in self.positions]
        return torch.from_numpy(np.stack(rows)).to(self.images.device)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers per sample, float32, (B, *shape), keyed by (seed, stream, position)."""
        rows = [keyed(self.seed, stream, int(p)).standard_normal(shape, dtype=np.float32) for p in self.positions]
        return torch.from_numpy(np.stack(rows)).to(self.images.device)
