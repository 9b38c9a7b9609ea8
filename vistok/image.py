"""Pictures in, tensors out, and back: whatever Pillow reads becomes float RGB in [0, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 120_000_000  # a larger picture is refused before its pixels are decoded
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm", ".pgm")


class PictureError(ValueError):
    """A picture that cannot be used; the message says which one and why."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a picture becomes what a tokenizer was trained on. Travels with the weights.

    Attributes:
        size: (H, W) in pixels.
        crop: `center`: the shorter edge is resized to fit, then the centre is cut out; `squash`: resized to `size`
            whatever its shape; `none`: kept as it is (any size divisible by `multiple`).
        resample: Pillow filter; `bicubic`, `bilinear` and `lanczos` are antialiased.
        multiple: With `none`, height and width must be multiples of this.
    """

    size: tuple[int, int] = (256, 256)
    crop: Literal["center", "squash", "none"] = "center"
    resample: Literal["bicubic", "bilinear", "lanczos", "box", "nearest"] = "bicubic"
    multiple: int = 1

    def __call__(self, picture: Any) -> Tensor:
        """One picture (PIL or path) as float RGB in [0, 1], (3, H, W)."""
        return pil_to_tensor(self.resize(to_pil(picture)))

    def resize(self, picture: Image) -> Image:
        """Resize and crop a picture as described above."""
        from PIL import Image

        if self.crop == "none":
            return picture
        height, width = self.size
        resample = Image.Resampling[self.resample.upper()]
        if self.crop == "squash":
            return picture.resize((width, height), resample)
        # The geometry of "resize the shorter edge, then cut out the centre" (torchvision's rounding), done as one
        # resize of a box: the same pixels, and a 1 x 60,000 px picture never becomes a larger one.
        scale = max(height / picture.height, width / picture.width)
        full_h, full_w = max(height, int(picture.height * scale)), max(width, int(picture.width * scale))
        top, left = round((full_h - height) / 2), round((full_w - width) / 2)
        step_y, step_x = picture.height / full_h, picture.width / full_w
        box = (left * step_x, top * step_y, (left + width) * step_x, (top + height) * step_y)
        box = (box[0], box[1], min(box[2], picture.width), min(box[3], picture.height))
        return picture.resize((width, height), resample, box=box)

    def check(self, images: Tensor) -> None:
        """Refuse a batch of the wrong size or range.

        Raises:
            ValueError: Not (B, 3, H, W) of the trained size, or values outside [0, 1]; says what it saw.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Images are (B, 3, H, W) and got {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        if self.crop == "none":
            if height % self.multiple or width % self.multiple:
                raise ValueError(f"Height and width must be multiples of {self.multiple}, got {height}x{width}.")
        elif (height, width) != self.size:
            raise ValueError(
                f"This model takes {self.size[0]}x{self.size[1]} and got a tensor of {height}x{width}. Give paths or "
                f"PIL pictures to have them resized, or build the model with image_size=[{height}, {width}]."
            )
        if not images.numel():
            raise ValueError("The batch is empty.")
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ValueError(f"Images are float in [0, 1] and these span [{float(low):.3g}, {float(high):.3g}]. Scale them.")


def to_pil(picture: Any) -> Image:
    """Open a path or take a PIL picture; 8-bit RGB, upright.

    EXIF orientation is applied, palettes, grey, CMYK and 16-bit pictures are converted, alpha is laid on white.

    Raises:
        FileNotFoundError: No such file.
        PictureError: Not a picture, damaged, or more than `MAX_PIXELS` pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = str(picture) if isinstance(picture, (str, Path)) else "the picture"
    if isinstance(picture, (str, Path)) and not Path(picture).is_file():
        raise FileNotFoundError(f"There is no picture {name!r}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit below is the lower one
            found = Image.open(picture) if isinstance(picture, (str, Path)) else picture
            if found.width * found.height > MAX_PIXELS:
                raise PictureError(
                    f"{name} has {found.width}x{found.height} pixels; up to {MAX_PIXELS // 10**6} million are read. Make it smaller."
                )
            return _to_rgb(ImageOps.exif_transpose(found))
    except (UnidentifiedImageError, Image.DecompressionBombError) as err:
        raise PictureError(f"{name} is not a picture that Pillow reads.") from err
    except (OSError, SyntaxError, ValueError, EOFError) as err:
        if isinstance(err, PictureError):
            raise
        raise PictureError(f"{name} is damaged or not fully written: {err}") from err


def _to_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float32)
        top = 65535.0 if picture.mode.startswith("I") else max(float(np.nanmax(values, initial=0.0)), 1.0)
        picture = Image.fromarray(np.clip(np.nan_to_num(values) / top * 255 + 0.5, 0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, rgba)
    return picture.convert("RGB")


def pil_to_tensor(picture: Image) -> Tensor:
    """8-bit RGB picture -> float in [0, 1], (3, H, W)."""
    array = np.array(picture, dtype=np.uint8)  # (H, W, 3)
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(255)


def to_tensor(images: Any, preprocess: Preprocess) -> Tensor:
    """Whatever a user gives as a batch of float RGB pictures in [0, 1], (B, 3, H, W).

    Args:
        images: A float tensor in [0, 1] or uint8 tensor, (B, 3, H, W) or (3, H, W); a PIL picture; a path; or a list
            of these. Pictures and paths are preprocessed; tensors must already have the right size.
        preprocess: Size, crop and filter of the model.

    Raises:
        ValueError: A tensor of the wrong size or range, or an empty batch.
        TypeError: Something else.
    """
    if isinstance(images, Tensor):
        batch = images.unsqueeze(0) if images.ndim == 3 else images
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch
        if not batch.is_floating_point():
            raise TypeError(f"Image tensors are float in [0, 1] or uint8, got {batch.dtype}.")
        preprocess.check(batch)
        return batch
    if isinstance(images, Sequence) and not isinstance(images, str):
        if not images:
            raise ValueError("The list of pictures is empty.")
        parts = [to_tensor(image, preprocess) for image in images]
        if len({p.shape[1:] for p in parts}) > 1:
            raise ValueError("These pictures have different sizes, so they cannot form one batch. Encode them one by one.")
        return torch.cat(parts)
    if isinstance(images, (str, Path)) or hasattr(images, "getbands"):
        one = preprocess(images).unsqueeze(0)
        preprocess.check(one)
        return one
    raise TypeError(f"Images are tensors, PIL pictures, paths or lists of these, got {type(images).__name__}.")


def to_uint8(images: Tensor) -> Tensor:
    """Float pictures to uint8, clamped and rounded to nearest (the rounding every metric here uses)."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pictures(images: Tensor) -> list[Image]:
    """Float pictures in [0, 1], (B, 3, H, W), as 8-bit PIL pictures."""
    from PIL import Image

    arrays = to_uint8(images.detach()).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in arrays]


def find_pictures(source: str | Path) -> list[Path]:
    """Picture files of a path, a folder (recursively) or a glob pattern, sorted.

    Raises:
        FileNotFoundError: Nothing there; says what was looked for.
    """
    import glob

    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    else:
        found = sorted(Path(p) for p in glob.glob(str(source), recursive=True) if Path(p).is_file())
    if not found:
        kind = "no pictures in the folder" if path.is_dir() else "no file, folder or pattern"
        raise FileNotFoundError(f"There is {kind} {str(source)!r} (looked for {', '.join(EXTENSIONS)}).")
    return found
