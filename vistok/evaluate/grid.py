"""Reconstruction grids: the original above the reconstruction, PSNR below; ladders of one picture at many lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vistok.image import save_png, to_pictures
from vistok.losses.base import check_pair

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

INK, GREY, PAPER = (24, 29, 39), (107, 114, 128), (255, 255, 255)
SMALLEST_CELL = 128  # pictures below are enlarged by a whole factor, so that pixels stay pixels
GAP, MARGIN, CAPTION = 10, 24, 22


def reconstruction_grid(
    originals: Tensor,
    reconstructions: Tensor,
    *,
    captions: Sequence[str] | None = None,
    title: str = "",
    columns: int = 8,
) -> Image:
    """A picture of pairs: in every band the originals above, their reconstructions below, a caption under each pair.

    Args:
        originals: Pictures in [0, 1], (B, 3, H, W).
        reconstructions: Same shape; clamped and rounded for display and for PSNR.
        captions: Name of each pair; its PSNR is added. None shows the PSNR alone.
        title: A line at the top.
        columns: Most pairs in a band.

    Returns:
        An RGB picture.

    Raises:
        ValueError: Shapes that do not fit, no picture, or another number of captions.
    """
    check_pair(reconstructions, originals)
    count = len(originals)
    if not count or (captions is not None and len(captions) != count):
        raise ValueError(f"A grid needs at least one pair and one caption for each, got {count} and {captions!r}.")
    from PIL import Image, ImageDraw

    from vistok.evaluate.pixel import Psnr

    psnr = Psnr().update(reconstructions, originals).tolist()
    pairs = list(zip(to_pictures(originals.float()), to_pictures(reconstructions.float())))
    scale = max(1, math.ceil(SMALLEST_CELL / originals.shape[-1]))
    width, height = originals.shape[-1] * scale, originals.shape[-2] * scale
    bands = math.ceil(count / columns)
    columns = math.ceil(count / bands)
    top = MARGIN + (34 if title else 0)
    band = 2 * height + 4 + CAPTION + GAP + 8
    gutter = 22
    canvas = Image.new(
        "RGB", (2 * MARGIN + gutter + columns * (width + GAP) - GAP, top + bands * band + MARGIN - GAP - 8), PAPER
    )
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN - 6), _fit(draw, title, _font(18), canvas.width - 2 * MARGIN), INK, _font(18))
    for i, pair in enumerate(pairs):
        x = MARGIN + gutter + i % columns * (width + GAP)
        y = top + i // columns * band
        for row, picture in enumerate(pair):
            resized = picture.resize((width, height), Image.Resampling.NEAREST) if scale > 1 else picture
            canvas.paste(resized, (x, y + row * (height + 4)))
            if i % columns == 0:
                _sideways(canvas, ("original", "reconstruction")[row], (MARGIN, y + row * (height + 4)), height)
        _caption(draw, captions[i] if captions else "", psnr[i], (x, y + 2 * height + 9), width)
    return canvas


def save_grid(
    path: str | Path,
    originals: Tensor,
    reconstructions: Tensor,
    *,
    captions: Sequence[str] | None = None,
    title: str = "",
    columns: int = 8,
) -> Path:
    """Write `reconstruction_grid` as a PNG, atomically; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = reconstruction_grid(originals, reconstructions, captions=captions, title=title, columns=columns)
    save_png(grid, path)
    return path


def ladder(
    originals: Tensor, steps: Mapping[str, Tensor], *, captions: Sequence[str] | None = None, title: str = ""
) -> Image:
    """A picture with one row per original and one column per step, the original last, PSNR under each.

    Args:
        originals: Pictures in [0, 1], (B, 3, H, W).
        steps: Reconstructions of the same shape under the names of their columns, e.g. `32 tokens`.
        captions: Name of each original.
        title: A line at the top.

    Returns:
        An RGB picture.

    Raises:
        ValueError: Shapes that do not fit, no picture or step, or another number of captions.
    """
    count = len(originals)
    if not count or not steps or (captions is not None and len(captions) != count):
        raise ValueError(
            f"A ladder needs pictures, steps and a caption for each picture, got {count} and {captions!r}."
        )
    from PIL import Image, ImageDraw

    from vistok.evaluate.pixel import Psnr

    scale = max(1, math.ceil(SMALLEST_CELL / originals.shape[-1]))
    width, height = originals.shape[-1] * scale, originals.shape[-2] * scale
    top, row = MARGIN + (34 if title else 0) + CAPTION, height + CAPTION + GAP
    canvas = Image.new("RGB", (2 * MARGIN + (len(steps) + 1) * (width + GAP) - GAP, top + count * row + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN - 6), _fit(draw, title, _font(18), canvas.width - 2 * MARGIN), INK, _font(18))
    for column, (name, pictures) in enumerate([*steps.items(), ("original", originals)]):
        x = MARGIN + column * (width + GAP)
        draw.text((x, top - CAPTION), _fit(draw, name, _font(13), width), GREY, _font(13))
        psnr = [None] * count if pictures is originals else Psnr().update(pictures, originals).tolist()
        for i, picture in enumerate(to_pictures(pictures.float())):
            resized = picture.resize((width, height), Image.Resampling.NEAREST) if scale > 1 else picture
            canvas.paste(resized, (x, top + i * row))
            text = captions[i] if captions and pictures is originals else ""
            _caption(draw, text, psnr[i], (x, top + i * row + height + 4), width)
    return canvas


def count_tokens(count: int) -> str:
    """A number of tokens in words, for headings."""
    return f"{count} token{'s' * (count != 1)}"


def save_ladder(
    path: str | Path,
    originals: Tensor,
    steps: Mapping[str, Tensor],
    *,
    captions: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """Write `ladder` as a PNG, atomically; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(ladder(originals, steps, captions=captions, title=title), path)
    return path


def _font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)  # type: ignore[return-value]


def _fit(draw: ImageDraw, text: str, font: FreeTypeFont, width: float) -> str:
    """The text, shortened with an ellipsis to a width in pixels."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."


def _caption(draw: ImageDraw, name: str, psnr: float | None, at: tuple[int, int], width: int) -> None:
    """Name at the left, PSNR (if there is one) at the right of a pair."""
    font = _font(13)
    figure = "" if psnr is None else f"{psnr:.1f} dB"
    used = draw.textlength(figure, font)
    draw.text((at[0] + width - used, at[1]), figure, INK, font)
    if name:
        draw.text(at, _fit(draw, name, font, width - used - 8), GREY, font)


def _sideways(canvas: Image, text: str, at: tuple[int, int], height: int) -> None:
    """A row label, turned to read upwards, in the middle of a row."""
    from PIL import Image, ImageDraw

    font = _font(13)
    length = math.ceil(ImageDraw.Draw(canvas).textlength(text, font))
    strip = Image.new("RGB", (length, 18), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, GREY, font)
    turned = strip.rotate(90, expand=True)
    canvas.paste(turned, (at[0], at[1] + max(0, (height - length) // 2)))
