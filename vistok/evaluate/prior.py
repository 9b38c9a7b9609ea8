"""Fit the entropy coder's prior of a tokenizer to pictures, and measure what it saves on others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vistok.codec import prior as codec
from vistok.data.augment import Augment
from vistok.data.base import keyed
from vistok.image import PictureError, read_batches, to_pil
from vistok.tokenizers.base import Tokenizer
from vistok.tokens import NAMELESS, Tokens, to_bytes

HELD_OUT = 5
"""Every so many pictures one measures a prior that was fitted without it."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A prior and what it saves.

    Attributes:
        prior: Fitted to all pictures.
        pictures: How many.
        measured: Pictures that the sizes below are means over (with all of their crops): every fifth, under a prior
            fitted to the others. 0 if there are fewer than two pictures.
        packed_bytes: Of a whole `.vtok` file, packed.
        coded_bytes: The same, entropy-coded where that is smaller.
        skipped: Picture -> why it could not be used.
    """

    prior: codec.Prior
    pictures: int
    measured: int
    packed_bytes: float
    coded_bytes: float
    skipped: dict[Path, str]

    @property
    def saving(self) -> float:
        """Share of the files that coding saves."""
        return 1 - self.coded_bytes / self.packed_bytes if self.measured else 0.0


@torch.no_grad()
def fit(
    tokenizer: Tokenizer,
    pictures: Sequence[Path],
    *,
    batch: int = 16,
    crops: int = 0,
    smallest: float = 0.15,
    progress: Callable[[int], None] | None = None,
) -> Fitted:
    """Encode pictures, fit the kind of prior that the tokenizer has a use for, and measure it.

    Args:
        tokenizer: A tokenizer with ids.
        pictures: Picture files; `tokenizer.preprocess` is applied. Files that cannot be read are skipped and named.
        batch: Pictures at once.
        crops: Random crops of each picture, half of them mirrored, the same at every call, instead of the picture as
            it is preprocessed; its filter and channels stay.
        smallest: Smallest share of a picture's area that a crop takes.
        progress: Called with the number of pictures done.

    Raises:
        CodecError: The range coder is not installed.
        ValueError: Continuous latents, ids that no table can hold, pictures of several sizes, or none at all.
    """
    codec.require(tokenizer)
    broken: dict[Path, str] = {}
    found: list[Tensor] = []
    owners: list[Path] = []  # of every row of `found`
    used: dict[Path, None] = {}
    how = tokenizer.preprocess
    read = read_batches(pictures, how, batch, broken=broken)
    if crops:
        cut = {"size": how.size, "resample": how.resample, "channels": how.channels}
        read = _cropped(pictures, Augment(crop="resized", scale=(smallest, 1.0), **cut), crops, batch, broken)
    for files, images in read:
        ids = tokenizer.encode(images).ids
        assert ids is not None
        found.append(ids.cpu())
        owners += files
        used.update(dict.fromkeys(files))
        if progress is not None:
            progress(len(used) + len(broken))
    if not found:
        raise ValueError(f"There is no picture to fit to ({'; '.join(broken.values()) or 'the list is empty'}).")
    if len({part.shape[1] for part in found}) > 1:
        raise ValueError("Pictures of different sizes have different numbers of tokens: a prior is of one size.")
    every = torch.cat(found)  # (B, K[, G])
    left_out = set(list(used)[min(HELD_OUT, len(used)) - 1 :: HELD_OUT])
    held = torch.tensor([owner in left_out for owner in owners])
    packed, coded = 0.0, 0.0
    if len(used) > 1:
        other = codec.fit(tokenizer, every[~held])
        files = [Tokens(ids=ids[None], vocab=tokenizer.quantizer.vocab_sizes) for ids in every[held]]
        packed = len(to_bytes(files[0], NAMELESS))
        coded = sum(len(to_bytes(one, NAMELESS, other)) for one in files) / len(files)
    return Fitted(
        prior=codec.fit(tokenizer, every),
        pictures=len(used),
        measured=len(left_out) if len(used) > 1 else 0,
        packed_bytes=packed,
        coded_bytes=coded,
        skipped=broken,
    )


def _cropped(
    pictures: Sequence[Path], augment: Augment, count: int, batch: int, broken: dict[Path, str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """As `read_batches`: `count` crops of one picture after the other, at most `batch` at once."""
    for i, path in enumerate(pictures):
        try:
            picture = to_pil(path)
        except (PictureError, OSError, ValueError) as err:
            broken[path] = str(err)
            continue
        for first in range(0, count, batch):
            some = range(first, min(first + batch, count))
            cuts = np.stack([augment(picture, keyed(0, "prior", i, j)) for j in some])  # (N, H, W, 3)
            yield [path] * len(some), torch.from_numpy(cuts).permute(0, 3, 1, 2).float() / 255
