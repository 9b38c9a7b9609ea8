"""Draw assets/photos.jpg, the contact sheet of the bundled photographs.

Run: python assets/contact_sheet.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

HERE = Path(__file__).parent
PHOTOS = HERE.parent / "vistok" / "data" / "photos"


def contact_sheet(pictures: Sequence[Path], *, columns: int = 7, side: int = 128, gap: int = 4) -> Image.Image:
    """Square cut-outs of pictures in rows, in the order given."""
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), (255, 255, 255))
    for i, path in enumerate(pictures):
        with Image.open(path) as picture:
            cell = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        sheet.paste(cell, (i % columns * (side + gap), i // columns * (side + gap)))
    return sheet


if __name__ == "__main__":
    contact_sheet(sorted(PHOTOS.glob("*.jpg"))).save(HERE / "photos.jpg", quality=88)
