"""LLaVA-NeXT: a base grid and an unpadded mosaic whose rows end in a newline."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vistok.plugins.families.base import Block, Family
from vistok.registry import register


def anyres_blocks(features: Tensor, newline: Tensor | None) -> list[Block]:
    """Grids of one packed image: base, then mosaic; newlines are found by comparing with the newline vector.

    Args:
        features: (N, D).
        newline: (D,), None if the host has none.
    """
    n = len(features)
    ends = torch.zeros(0, dtype=torch.int64)
    if newline is not None:
        ends = torch.where((features == newline.to(features)).all(-1))[0].cpu()
    if len(ends) == 0 or (len(ends) == 1 and ends[0] == n - 1):  # a single crop, closed by one newline
        side = math.isqrt(n - len(ends))
        square = side * side == n - len(ends)
        grid = (side, side) if square else None
        return [Block(columns=torch.arange(n - len(ends)), grid=grid, newlines=ends)]
    step = int(ends[1] - ends[0]) if len(ends) > 1 else int(n - ends[0] + 1)
    start = int(ends[0]) - step + 1
    base = math.isqrt(start)
    rows = torch.arange(start, n).view(-1, step)
    mosaic = Block(columns=rows[:, :-1].flatten(), grid=(len(rows), step - 1), newlines=rows[:, -1])
    first = Block(columns=torch.arange(start), grid=(base, base) if base * base == start else None)
    return [first, mosaic]


@register("family", "llava_next")
class LlavaNext(Family):
    """Several crops per picture; an image is the whole of base grid and mosaic."""

    hosts = ("LlavaNextForConditionalGeneration",)

    def blocks(self, model: Any, output: Any, kwargs: dict[str, Any], modality: str) -> list[list[Block]]:
        """Base grid and mosaic of every picture."""
        newline = getattr(self.base(model), "image_newline", None)
        return [anyres_blocks(f, newline) for f in self.features(model, output)]
