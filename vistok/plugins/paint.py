"""A picture with what became of its tokens painted over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DIM, TINT = 0.25, 0.35  # how much of a dropped cell stays, how strongly a merged cell is coloured


def paint(image: Any, slots: Tensor, sizes: Tensor) -> Any:
    """Dropped tokens dark, kept ones as they are, merged ones in the colour of the token they went into.

    Args:
        image: A PIL picture, or a float tensor in [0, 1], (3, H, W).
        slots: Token that each cell of the grid went into, -1 where it was dropped, (h, w).
        sizes: Cells that went into each of these tokens, (h, w); above 1 they were merged.

    Returns:
        A PIL picture of the same size.
    """
    import numpy as np
    from PIL import Image

    if isinstance(image, Tensor):
        pixels = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    else:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    height, width = pixels.shape[:2]
    rows = torch.arange(height) * slots.shape[0] // height
    columns = torch.arange(width) * slots.shape[1] // width
    slot = slots.cpu()[rows][:, columns].numpy()[..., None]
    merged = sizes.cpu()[rows][:, columns].numpy()[..., None] > 1
    hue = (slot * 0.618034) % 1  # the golden ratio sets neighbours apart
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    shown = np.where(merged, (1 - TINT) * pixels + TINT * colour, pixels)
    shown = np.where(slot < 0, DIM * pixels, shown)
    return Image.fromarray((shown * 255).round().astype(np.uint8))
