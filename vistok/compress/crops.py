"""The crops of a high-resolution picture: what the overview says about them, and how a budget is shared out.

A picture comes as an overview (the whole of it, small) and rows x cols crops. Every crop covers a cell of the overview.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Where a crop lies in its picture; the padding around the picture is not counted.

    Attributes:
        overview: It is the overview, not a crop.
        number: Number of the crop, row by row; 0 for the overview.
        layout: Rows and columns of crops.
        top: Row of its first token in the mosaic of all crops.
        left: Column of its first token there.
        mosaic: Rows and columns of tokens in the mosaic.
    """

    overview: bool = False
    number: int = 0
    layout: tuple[int, int] = (1, 1)
    top: int = 0
    left: int = 0
    mosaic: tuple[int, int] = (0, 0)


def cells(grid: tuple[int, int], layout: tuple[int, int], *, spatial: bool = True) -> Tensor:
    """Crop that every token of the overview belongs to, (h * w,).

    Cells are floor(h / rows) x floor(w / cols) tokens; what is left over belongs to the last ones.

    Args:
        grid: Rows and columns of the overview's tokens.
        layout: Rows and columns of crops.
        spatial: False gives the strips of the released HiRED code, which cuts the flat list of tokens into rows * cols
            equal pieces, whatever their place in the picture.

    Raises:
        ValueError: Strips of unequal length.
    """
    (h, w), (rows, cols) = grid, layout
    if not spatial:
        if h * w % (rows * cols):
            raise ValueError(f"{h * w} tokens do not divide into {rows} x {cols} equal strips. Leave `reference` off.")
        return torch.arange(h * w) // (h * w // (rows * cols))
    row = (torch.arange(h) // max(h // rows, 1)).clamp_max(rows - 1)
    col = (torch.arange(w) // max(w // cols, 1)).clamp_max(cols - 1)
    return (row.unsqueeze(1) * cols + col).flatten()


def retention_ratios(
    scores: Tensor, grid: tuple[int, int], layout: tuple[int, int], ratio: float, temperature: float = 10.0
) -> Tensor:
    """Share of its tokens that every crop keeps (GlobalCom2, arXiv 2501.05179, adaptive compression adjustment).

    r_c = min(r (1 + p_c - mean p), 1), p the softmax of the scores summed over each crop's cell, divided by a
    temperature. The mean of r_c is r unless one is clipped.

    Args:
        scores: Logits of the class token over the overview's tokens, (N,). Probabilities would make every share equal.
        grid: Rows and columns of the overview's tokens.
        layout: Rows and columns of crops.
        ratio: r, in (0, 1].
        temperature: Of the softmax.

    Returns:
        float64, (rows * cols,).
    """
    crops = layout[0] * layout[1]
    cell = cells(grid, layout).to(scores.device)
    total = torch.zeros(crops, dtype=torch.float64, device=scores.device).index_add(0, cell, scores.double())
    share = torch.exp((total - total.max()) / temperature)
    share = share / (share.sum() + 1e-8)
    return (ratio * (1 + share - share.mean())).clamp_max(1)


def content_counts(content: Tensor, cell: Tensor, crops: int, alpha: float) -> Tensor:
    """How many of the overview's most attended tokens lie in each crop's cell (HiRED, arXiv 2408.10945).

    Args:
        content: The class token's attention in the first block, (N,).
        cell: Crop of every token, (N,).
        crops: Number of crops.
        alpha: The best int(N (1 - alpha)) count.

    Returns:
        int64, (crops,).
    """
    best = content.sort(descending=True, stable=True).indices[: int(len(content) * (1 - alpha))]
    return torch.bincount(cell.to(content.device)[best], minlength=crops)


def share_out(total: int, weights: Sequence[float], room: Sequence[int], least: int = 0) -> list[int]:
    """Whole numbers in proportion to weights, none above its room, that add up to `total` (or to all room).

    What is left after rounding down goes to the largest weights, one each; ties go to the first.

    Args:
        total: What there is.
        weights: At least 0.
        room: Upper bound of each.
        least: Lower bound of each that has room, as far as `total` goes.
    """
    total = min(total, sum(room))
    given = [min(least, r) for r in room]
    if sum(given) > total:
        given = [0] * len(room)
    while (left := total - sum(given)) > 0:
        hungry = [i for i in range(len(room)) if given[i] < room[i]]
        mass = sum(weights[i] for i in hungry)
        want = {i: left * weights[i] / mass if mass > 0 else left / len(hungry) for i in hungry}
        served = {i: min(math.floor(want[i]), room[i] - given[i]) for i in hungry}
        if not any(served.values()):
            served = dict.fromkeys(sorted(hungry, key=lambda i: (-want[i], i))[:left], 1)
        for i, more in served.items():
            given[i] += more
    return given


def valid_rectangle(size: tuple[int, int], layout: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Rows and columns of the mosaic that show the picture, not the padding around it: top, bottom, left, right.

    Args:
        size: Width and height of the picture.
        layout: Rows and columns of crops.
        side: Tokens along the side of a crop.
    """
    (width, height), (rows, cols) = size, layout
    mosaic_h, mosaic_w = rows * side, cols * side
    if width / height > mosaic_w / mosaic_h:
        pad = (mosaic_h - int(round(height * mosaic_w / width, 7))) // 2
        return pad, mosaic_h - pad, 0, mosaic_w
    pad = (mosaic_w - int(round(width * mosaic_h / height, 7))) // 2
    return 0, mosaic_h, pad, mosaic_w - pad


def guided_scores(local: Tensor, overview: Tensor, crop: Crop, grid: tuple[int, int]) -> Tensor:
    """Scores of a crop's tokens: its own and the overview's, each of length one over the crop, added (GlobalCom2).

    Args:
        local: Logits of the crop's own class token, (h * w,).
        overview: Logits over the overview as a map, (H, W); resized (bilinear) to the mosaic and cut out.
        crop: Where the crop lies.
        grid: Its rows and columns of tokens, h and w.
    """
    resized = F.interpolate(overview.float()[None, None], crop.mosaic, mode="bilinear", align_corners=False)[0, 0]
    cut = resized[crop.top : crop.top + grid[0], crop.left : crop.left + grid[1]].flatten()
    found: Tensor = F.normalize(local.float(), dim=0, eps=1e-12) + F.normalize(cut, dim=0, eps=1e-12)
    return found


def split_axis(rectangle: tuple[int, int], side: int, crops: int) -> list[tuple[int, int]]:
    """Start and length of every crop's share of the valid part [start, stop) of a mosaic axis, counted from start."""
    start, stop = rectangle
    edges = [min(max(i * side, start), stop) - start for i in range(crops + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def stitch(
    chosen: Sequence[Tensor], rectangle: tuple[int, int, int, int], layout: tuple[int, int], side: int
) -> list[tuple[int, int]]:
    """Mosaic places of the chosen tokens as the released GlobalCom2 code has them, newlines in between.

    The code takes the number of a token inside its crop *without* padding for its number in the whole crop, so tokens
    of padded crops move up and left, and it ends every row of the mosaic with a newline, padding rows too.

    Args:
        chosen: Tokens of every crop, numbered inside its valid part.
        rectangle: From `valid_rectangle`.
        layout: Rows and columns of crops.
        side: Tokens along the side of a crop.

    Returns:
        In reading order (crop, token) for a token, (-1, row) for a newline.
    """
    top, bottom, left, right = rectangle
    down, across = split_axis((top, bottom), side, layout[0]), split_axis((left, right), side, layout[1])
    assert len(down) * len(across) == len(chosen)
    placed = []
    for c, tokens in enumerate(chosen):
        r, col = divmod(c, layout[1])
        for token in tokens.tolist():
            placed.append((r * side + token // side, col * side + token % side, c, token))
    out: list[tuple[int, int]] = []
    at = 0
    placed.sort()
    for row in range(layout[0] * side):
        while at < len(placed) and placed[at][0] == row:
            out.append(placed[at][2:])
            at += 1
        out.append((-1, row))
    return out
