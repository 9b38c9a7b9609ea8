"""Views of a picture that are tokenised: the crop of the tokenizer, its mirror image, ten crops."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vistok.image import Preprocess, first_channel

if TYPE_CHECKING:
    from PIL.Image import Image

Augmentation = Literal["none", "flip", "ten-crop"]
COUNTS: dict[str, int] = {"none": 1, "flip": 2, "ten-crop": 10}


@dataclass(frozen=True, kw_only=True)
class Views:
    """Which views of every picture are made, always the same ones in the same order.

    Attributes:
        augment: `none`: the tokenizer's own crop. `flip`: that and its mirror image. `ten-crop`: the picture is cropped
            as the tokenizer says, but `enlarge` times as large; of that the corners (top left, top right, bottom left,
            bottom right) and the middle, then the five of its mirror image, as torchvision's TenCrop has them
            (generators of LlamaGen and TiTok train on these, 1.1 times as large; LlamaGen resizes in another way).
        enlarge: For `ten-crop`.
    """

    augment: Augmentation = "none"
    enlarge: float = 1.1

    def __post_init__(self) -> None:
        if self.augment not in COUNTS:
            raise ValueError(f"An augmentation is one of {', '.join(COUNTS)}, got {self.augment!r}.")
        if self.augment == "ten-crop" and not 1 < self.enlarge <= 4:
            raise ValueError(f"Ten crops are cut out of a picture 1 to 4 times as large, got {self.enlarge:g}.")

    def __len__(self) -> int:
        return COUNTS[self.augment]

    def facts(self) -> dict[str, Any]:
        """What decides the views, for the manifest."""
        return {"augment": self.augment, "count": len(self), "enlarge": self.enlarge if len(self) == 10 else None}

    def __call__(self, picture: Image, preprocess: Preprocess) -> np.ndarray:
        """All views of an 8-bit RGB picture, uint8 (V, H, W, 3)."""
        height, width = preprocess.size
        if self.augment != "ten-crop":
            cut = _array(picture, preprocess)
            return np.stack([cut, cut[:, ::-1]][: len(self)])
        large = (round(height * self.enlarge), round(width * self.enlarge))
        whole = _array(picture, dataclasses.replace(preprocess, size=large))
        down, right = large[0] - height, large[1] - width
        places = ((0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2)))
        return np.stack([side[y : y + height, x : x + width] for side in (whole, whole[:, ::-1]) for y, x in places])


def _array(picture: Image, preprocess: Preprocess) -> np.ndarray:
    found = preprocess.resize(picture)
    return np.asarray(first_channel(found) if preprocess.channels == 1 else found, dtype=np.uint8)
