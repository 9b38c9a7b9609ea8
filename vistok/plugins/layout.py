"""Which columns of a prompt belong to which image of which sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Placeholders found in a prompt, before the mask of real tokens is known.

    Attributes:
        masks: Placeholders per modality, (B, L).
        images: Tokens of every image, per modality and sample.
    """

    masks: dict[str, Tensor]
    images: dict[str, list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What stands in each column of the (possibly shortened) sequence; tensors are (B, L).

    Attributes:
        index: Column of the uncompressed prompt.
        valid: True at tokens, False at padding and fillers.
        segment: Image of the sample, -1 elsewhere.
        place: Position inside the image.
        protect: Tokens that must stay.
        counts: Tokens of every image, per sample (on the host).
        texts: Other tokens, per sample.
        full: No column is padding.
        dropped: Image tokens that went, (B, 1).
    """

    index: Tensor
    valid: Tensor
    segment: Tensor
    place: Tensor
    protect: Tensor
    counts: list[list[int]]
    texts: list[int]
    full: bool
    dropped: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens per sample."""
        return [text + sum(row) for text, row in zip(self.texts, self.counts)]

    def gather(self, index: Tensor, valid: Tensor, counts: list[list[int]]) -> Columns:
        """The columns at `index` (B, M), of which `valid` are tokens."""
        gone = [sum(old) - sum(new) for old, new in zip(self.counts, counts)]
        lengths = [text + sum(row) for text, row in zip(self.texts, counts)]
        return Columns(
            index=self.index.gather(1, index),
            valid=valid,
            segment=self.segment.gather(1, index).masked_fill(~valid, -1),
            place=self.place.gather(1, index),
            protect=self.protect.gather(1, index) & valid,
            counts=counts,
            texts=self.texts,
            full=min(lengths) == index.shape[1],
            dropped=self.dropped + torch.tensor(gone, device=index.device).unsqueeze(1),
        )


def find(masks: dict[str, Tensor], sizes: dict[str, list[int]], *, runs: bool = False) -> Prompt:
    """Match placeholders with features; one host synchronisation.

    Args:
        masks: Placeholders per modality, (B, L).
        sizes: Features of every image per modality, in the order of the batch.
        runs: An uninterrupted run of placeholders is one image.

    Raises:
        ValueError: They do not match; the message names sample, image, expected and got.
    """
    images = {}
    for modality, mask in masks.items():
        per_row: list[int] = mask.sum(1).tolist()
        found = sizes.get(modality, [])
        if runs and sum(found) == sum(per_row):
            images[modality] = [_runs(row) for row in mask.cpu()]
        else:
            images[modality] = split_sizes(modality, found, per_row)
    return Prompt(masks=masks, images=images)


def build(prompt: Prompt, real: Tensor, protect: Tensor | None) -> Columns:
    """Columns of a whole prompt; one host synchronisation.

    Args:
        prompt: Placeholders and images.
        real: Tokens that are no padding, (B, L).
        protect: Tokens that must stay, (B, L).
    """
    batch, length = real.shape
    device = real.device
    segment = torch.full((batch, length), -1, device=device)
    place = torch.zeros((batch, length), dtype=torch.int64, device=device)
    total: list[int] = real.sum(1).tolist()
    counts: list[list[int]] = [[] for _ in range(batch)]
    for modality, mask in prompt.masks.items():
        rows = prompt.images[modality]
        offsets = [len(row) for row in counts]
        _fill(mask, rows, offsets, segment, place)
        for have, new in zip(counts, rows):
            have.extend(new)
    texts = [n - sum(row) for n, row in zip(total, counts)]
    return Columns(
        index=torch.arange(length, device=device).expand(batch, -1),
        valid=real,
        segment=segment,
        place=place,
        protect=torch.zeros_like(real) if protect is None else protect & real,
        counts=counts,
        texts=texts,
        full=min(total) == length,
        dropped=torch.zeros((batch, 1), dtype=torch.int64, device=device),
    )


def split_sizes(modality: str, sizes: Sequence[int], per_row: Sequence[int]) -> list[list[int]]:
    """Hand the images out to the samples by their numbers of placeholders.

    Args:
        modality: For messages.
        sizes: Features of every image in the order of the batch.
        per_row: Placeholders of every sample.

    Raises:
        ValueError: They do not match; the message names sample, image, expected and got.
    """
    rows: list[list[int]] = []
    left = list(sizes)
    for sample, room in enumerate(per_row):
        row: list[int] = []
        while room > 0:
            if not left or left[0] > room:
                expected = f"{left[0]} placeholders for its features" if left else "no more features"
                raise ValueError(
                    f"Sample {sample}, {modality} {len(row)}: expected {expected}, got {room} placeholders "
                    f"({per_row[sample]} in the sample; features per {modality}: {list(sizes)}). Build the prompt with "
                    "the model's own processor."
                )
            row.append(left.pop(0))
            room -= row[-1]
        rows.append(row)
    if any(left):
        last = len(per_row) - 1
        raise ValueError(
            f"Sample {last}, {modality} {len(rows[-1])}: expected {left[0]} placeholders for its features, got 0 "
            f"({len(left)} of {len(sizes)} {modality}s have no placeholder). Use the model's processor."
        )
    return rows


def run_lengths(mask: Tensor) -> list[int]:
    """Lengths of the uninterrupted runs of True, sample after sample, (B, L)."""
    return [length for row in mask.cpu() for length in _runs(row)]


def _runs(row: Tensor) -> list[int]:
    """Lengths of the uninterrupted runs of True in a mask, (L,)."""
    edges = torch.diff(row.int(), prepend=row.new_zeros(1).int(), append=row.new_zeros(1).int())
    return (torch.where(edges < 0)[0] - torch.where(edges > 0)[0]).tolist()


def _fill(mask: Tensor, rows: list[list[int]], offsets: list[int], segment: Tensor, place: Tensor) -> None:
    """Write image numbers and positions inside the image at the placeholders of one modality."""
    width = max((len(row) for row in rows), default=0)
    if width == 0:
        return
    device = mask.device
    ends = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device).cumsum(1)
    rank = (mask.cumsum(1) - 1).clamp_min(0)
    number = torch.searchsorted(ends, rank.contiguous(), right=True).clamp_max(width - 1)
    start = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=1).gather(1, number)
    offset = torch.tensor(offsets, device=device).unsqueeze(1)
    segment.copy_(torch.where(mask, number + offset, segment))
    place.copy_(torch.where(mask, rank - start, place))
