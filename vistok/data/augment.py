"""Crops and flips: one picture and one keyed random generator in, one array out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vistok.image import Preprocess, first_channel

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How training pictures are cut.

    Attributes:
        size: (H, W) in pixels.
        crop: `random`: the shorter edge is resized to fit, then a random place is cut out (TiTok, MaskGIT); `resized`:
            a random box of a random share of the area (Inception's crop); `center`, `squash`: no randomness, as in
            `Preprocess` (the middle, or the whole picture stretched to fit).
        scale: Smallest and largest share of the largest fitting box's area, for `resized`.
        ratio: Smallest and largest stretch of width against height, for `resized`.
        flip: Probability of a horizontal flip.
        resample: Pillow filter, antialiased where Pillow's is.
        channels: 1 for models of grey maps: the first channel stands in all three.
    """

    size: tuple[int, int]
    crop: Literal["random", "resized", "center", "squash"] = "random"
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    resample: Literal["bicubic", "bilinear", "lanczos", "box", "nearest"] = "bicubic"
    channels: Literal[1, 3] = 3

    def __call__(self, picture: Image, rng: np.random.Generator) -> np.ndarray:
        """One 8-bit RGB picture as uint8 (H, W, 3). The same draws are taken whatever the picture."""
        from PIL import Image

        draws = rng.random(5)
        height, width = self.size
        if self.crop in ("center", "squash"):
            cut = Preprocess(size=self.size, crop=self.crop, resample=self.resample).resize(picture)
        else:
            box = self._box(picture.width, picture.height, draws)
            cut = picture.resize((width, height), Image.Resampling[self.resample.upper()], box=box)
        array = np.asarray(first_channel(cut) if self.channels == 1 else cut, dtype=np.uint8)
        return array[:, ::-1] if draws[0] < self.flip else array

    def _box(self, width: int, height: int, draws: np.ndarray) -> Box:
        """Left, top, right, bottom in the source: the largest box of the target's shape, then scaled and stretched."""
        target = self.size[1] / self.size[0]
        box_w, box_h = min(width, height * target), min(height, width / target)
        if self.crop == "resized":
            share = math.sqrt(self.scale[0] + (self.scale[1] - self.scale[0]) * draws[3])
            low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
            stretch = math.exp((low + (high - low) * draws[4]) / 2)
            box_w, box_h = min(box_w * share * stretch, width), min(box_h * share / stretch, height)
        left, top = (width - box_w) * draws[1], (height - box_h) * draws[2]
        return left, top, min(left + box_w, width), min(top + box_h, height)
