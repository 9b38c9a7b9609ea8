"""`View`: everything a method may look at when it decides, free of any model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.compress.reduction import Reduction, pack
from vistok.compress.select import top_in_segments


@dataclass(kw_only=True)
class View:
    """The sequence in front of a layer, as a method sees it. Tensors are (B, L) over the current columns.

    Attributes:
        index: Column of every token in the uncompressed prompt, int64.
        valid: True at tokens, False at padding and fillers.
        segment: Number of the image inside its sample, -1 at text and padding.
        place: Position of the token inside its image (order of the tower), 0 elsewhere.
        protect: True at tokens that must stay.
        sizes: Tokens of every image before compression, per sample (known on the host).
        counts: Tokens of every image now, per sample.
        texts: Tokens that are no image tokens, per sample.
        layer: Layer in front of which the decision falls.
        stage: Number of the cut, from 0.
        hidden: Hidden states, (B, L, D).
        attention: Probabilities of the query rows the method asked for, float32, (B, heads, R, L).
        row_valid: True at rows that exist in this sample, (B, R).
        row_index: Current column of every row, (B, R).
        transitions: Accumulated token transition variation, float32.
        angles: Inverse frequencies of the rotary embedding, None if the model has none.
        positions: Position of every column in the rotary embedding.
        survivors: For eviction: True at columns that are still there at the last layer.
        survivor_counts: Their image tokens, per sample and image.
    """

    index: Tensor
    valid: Tensor
    segment: Tensor
    place: Tensor
    protect: Tensor
    sizes: list[list[int]]
    counts: list[list[int]]
    texts: list[int]
    layer: int = 0
    stage: int = 0
    hidden: Tensor | None = None
    attention: Tensor | None = None
    row_valid: Tensor | None = None
    row_index: Tensor | None = None
    transitions: Tensor | None = None
    angles: Tensor | None = None
    positions: Tensor | None = None
    survivors: Tensor | None = None
    survivor_counts: list[list[int]] | None = None

    @property
    def image(self) -> Tensor:
        """True at image tokens."""
        return self.segment >= 0

    @property
    def images(self) -> int:
        """Largest number of images in a sample."""
        return max((len(row) for row in self.sizes), default=0)

    def last_row(self) -> Tensor:
        """True at the last token of every sample."""
        place = torch.arange(self.valid.shape[1], device=self.valid.device)
        last = (place * self.valid).amax(1, keepdim=True)
        return (place == last) & self.valid

    def text_after_images(self) -> Tensor:
        """True at the tokens after the last image token; at the last token where there are none."""
        place = torch.arange(self.valid.shape[1], device=self.valid.device)
        last = torch.where(self.image, place, -1).amax(1, keepdim=True)
        after = (place > last) & self.valid
        return after | (self.last_row() & ~after.any(1, keepdim=True))

    def keep_top(self, scores: Tensor, quotas: list[list[int]]) -> Reduction | None:
        """Keep the best image tokens of every image; protected ones come first and count.

        Args:
            scores: Larger is better, (B, L).
            quotas: Tokens to keep per sample and image.

        Returns:
            The selection over all columns, None if nothing is to go.
        """
        quotas = [[min(q, n) for q, n in zip(row, now)] for row, now in zip(quotas, self.counts)]
        if quotas == self.counts:
            return None
        ranked = scores.double().masked_fill(self.protect, torch.inf)
        keep = top_in_segments(ranked, self.segment, quotas) | (self.valid & ~self.image)
        return pack(keep, max(text + sum(row) for text, row in zip(self.texts, quotas)))

    def keep_mask(self, mask: Tensor) -> tuple[Reduction | None, list[list[int]]]:
        """Keep the image tokens in a mask whose counts are not known beforehand (one host synchronisation).

        Args:
            mask: True at image tokens to keep, (B, L); protected ones stay in any case.

        Returns:
            The selection (None if nothing is to go) and the tokens kept per sample and image.
        """
        keep = (mask | self.protect) & self.image
        slots = keep.new_zeros(keep.shape[0], max(self.images, 1), dtype=torch.int64)
        found = slots.scatter_add(1, self.segment.clamp_min(0), keep.long()).tolist()
        counts = [row[: len(now)] for row, now in zip(found, self.counts)]
        if counts == self.counts:
            return None, counts
        longest = max(text + sum(row) for text, row in zip(self.texts, counts))
        return pack(keep | (self.valid & ~self.image), longest), counts
