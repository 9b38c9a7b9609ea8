"""Grids of an image's tokens, crops and newlines, and what becomes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.crops import Crop
from vistok.compress.reduction import Reduction

Part = tuple[Tensor, tuple[int, ...] | None, Crop | None]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tokens of an image that lie on one grid.

    Attributes:
        columns: Their places inside the image, row by row, (N,).
        grid: (h, w) or (t, h, w), None if unknown.
        newlines: Places of the newline after each row of the grid (one per row), or of a single closing one.
        overview: The grid is the overview of a picture that comes in crops too.
        rows: Rows of tokens in every row of crops, where the grid is a mosaic of crops.
        cols: Columns of tokens in every column of crops.
    """

    columns: Tensor
    grid: tuple[int, ...] | None
    newlines: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    overview: bool = False
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens on the grid."""
        return len(self.columns)

    def moved(self, offset: int) -> Block:
        """The same block behind `offset` other tokens."""
        return replace(self, columns=self.columns + offset, newlines=self.newlines + offset)

    def crops(self) -> list[Part]:
        """The crops of a mosaic: places inside the image, grid and where it lies; any other block is one part."""
        if not self.rows or self.grid is None:
            return [(self.columns, self.grid, Crop(overview=True) if self.overview else None)]
        h_all, w_all = self.grid
        layout, mosaic = (len(self.rows), len(self.cols)), self.columns.view(h_all, w_all)
        found: list[Part] = []
        for r, (top, h) in enumerate(zip(itertools.accumulate((0, *self.rows)), self.rows)):
            for c, (left, w) in enumerate(zip(itertools.accumulate((0, *self.cols)), self.cols)):
                place = Crop(number=r * layout[1] + c, layout=layout, top=top, left=left, mosaic=(h_all, w_all))
                if h * w:
                    found.append((mosaic[top : top + h, left : left + w].flatten(), (h, w), place))
        return found

    def newlines_kept(self, kept: Tensor) -> Tensor:
        """Newlines of the rows that hold a kept token; kept is a mask over the image, (N,)."""
        if self.grid is None or len(self.newlines) != self.length // self.grid[-1]:
            return self.newlines.to(kept.device)
        rows = kept[self.columns.to(kept.device)].view(-1, self.grid[-1]).any(1)
        return self.newlines.to(kept.device)[rows]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image after compression.

    Attributes:
        features: What goes to the language model, (M, D).
        keep: Columns of the image whose placeholders stay, (N,).
        protect: Those that later stages must not drop, (N,).
        reduction: From the image's columns to the features, (1, M).
    """

    features: Tensor
    keep: Tensor
    protect: Tensor
    reduction: Reduction


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """Encoded pictures that were made smaller before the tower.

    Attributes:
        output: Encoder output of the type the host expects.
        features: Of every image, rows of the mosaic with their newlines, (M, D).
        blocks: Grids of the full pictures.
        grids: Grids of the small ones, one for each block; () for a grid that has no tokens left.
    """

    output: Any
    features: list[Tensor]
    blocks: list[list[Block]]
    grids: list[list[tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Pictures behind the tower, in front of the projector, tile by tile.

    Attributes:
        output: What the tower gave.
        features: What the projector would get, (T, P, C).
        states: Hidden states of the tower, embeddings first, (T, P, C) each.
        grid: Rows and columns of a tile's patches.
        tiles: Tiles of every image.
        blocks: Grids of every image as the host lays it out.
    """

    output: Any
    features: Tensor
    states: tuple[Tensor, ...]
    grid: tuple[int, int]
    tiles: list[int]
    blocks: list[list[Block]]


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (..., C, H, W) made smaller, bicubic with antialiasing, in float32."""
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    small = F.interpolate(flat.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
    return small.view(*pixels.shape[:-2], *size)


def entry(
    features: Tensor,
    reduction: Reduction,
    protect: Tensor | None = None,
    *,
    columns: int | None = None,
    fill: bool = False,
) -> Entry:
    """An image after compression.

    Args:
        features: Of its outputs, (M, D).
        reduction: How they came about.
        protect: Which of its features must stay, (M,).
        columns: Placeholders of the image, if the reduction has one input more: the class token, which has none.
        fill: Several outputs may share an anchor or have none: further placeholders stay, the first ones, so that there
            is one for every feature. Only where positions are counted anew.
    """
    index = reduction.index[0].to(features.device)
    keep = torch.zeros(reduction.length, dtype=torch.bool, device=features.device)
    keep[index] = True
    keep = keep[:columns]
    if fill:
        extra = len(features) - int(keep.sum())
        keep[torch.where(~keep)[0][:extra]] = True
    must = torch.zeros_like(keep)
    if protect is not None:
        must[index] = protect
    return Entry(features=features, keep=keep, protect=must, reduction=reduction)


def grouped(lengths: Sequence[int], runs: Sequence[int]) -> list[int]:
    """How many tiles of these lengths make up each run of placeholders, the tiles left over one by one."""
    counts, at = [], 0
    for run in runs:
        tiles = 0
        while run > 0 and at < len(lengths):
            run -= lengths[at]
            at, tiles = at + 1, tiles + 1
        counts.append(tiles)
    return counts + [1] * (len(lengths) - at)


def square(n: int, start: int = 0) -> Block:
    """n tokens from `start` on, on a square grid if n is a square."""
    side = math.isqrt(n)
    return Block(columns=torch.arange(start, start + n), grid=(side, side) if side * side == n else None)
