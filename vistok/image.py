"""Pictures in, tensors out, and back: whatever Pillow reads becomes float RGB in [0, 1]."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vistok.hub import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 120_000_000  # a larger picture is refused before its pixels are decoded
_PART = 2**20  # samples that are converted at once
_STRIP = 16  # a resized picture this many times larger than the crop is a strip
_ORIENTATION = 0x0112  # the EXIF tag
_DAMAGE = (  # what Pillow's readers raise on damaged files, by format
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(struct.error, zlib.error),
)
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
        channels: 3, or 1 for models of grey maps: pictures have their first channel in all three.
    """

    size: tuple[int, int] = (256, 256)
    crop: Literal["center", "squash", "none"] = "center"
    resample: Literal["bicubic", "bilinear", "lanczos", "box", "nearest"] = "bicubic"
    multiple: int = 1
    channels: Literal[1, 3] = 3

    def __post_init__(self) -> None:
        size = tuple(self.size)  # a list where it comes from JSON
        if len(size) != 2 or min(size) < 1 or self.multiple < 1:
            raise ValueError(
                f"A size is (H, W) in pixels and a multiple at least 1, got {self.size} and {self.multiple}."
            )
        object.__setattr__(self, "size", size)

    def __call__(self, picture: Any) -> Tensor:
        """One picture (PIL or path) as float RGB in [0, 1], (3, H, W)."""
        found = self.resize(to_pil(picture))
        return pil_to_tensor(first_channel(found) if self.channels == 1 else found)

    def resize(self, picture: Image) -> Image:
        """Resize and crop a picture as described above; `center` is torchvision's Resize + CenterCrop, bit for bit."""
        from PIL import Image

        if self.crop == "none":
            return picture
        height, width = self.size
        resample = Image.Resampling[self.resample.upper()]
        if self.crop == "squash":
            return picture.resize((width, height), resample)
        if height * picture.width >= width * picture.height:
            full_h, full_w = height, max(width, height * picture.width // picture.height)
        else:
            full_h, full_w = max(height, width * picture.height // picture.width), width
        top, left = round((full_h - height) / 2), round((full_w - width) / 2)
        if full_h * full_w <= _STRIP * height * width:
            full = picture.resize((full_w, full_h), resample)
            return full.crop((left, top, left + width, top + height))
        # A 1 x 60,000 px strip must not become a larger one: resize only the box that is kept (Pillow may then run its
        # two passes in the other order, so that rounding differs).
        step_y, step_x = picture.height / full_h, picture.width / full_w
        box = (left * step_x, top * step_y, (left + width) * step_x, (top + height) * step_y)
        box = (box[0], box[1], min(box[2], picture.width), min(box[3], picture.height))
        return picture.resize((width, height), resample, box=box)

    def check(self, images: Tensor, *, any_size: bool = False) -> None:
        """Refuse a batch of the wrong size or range; `any_size` is for models that take pictures of every size.

        Raises:
            ValueError: Not (B, 3, H, W) of the trained size, or values outside [0, 1]; says what it saw.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Images are (B, 3, H, W) and got {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        if any_size:
            pass
        elif self.crop == "none":
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
            raise ValueError(
                f"Images are float in [0, 1] and these span [{float(low):.3g}, {float(high):.3g}]. Scale them."
            )


def first_channel(picture: Image) -> Image:
    """An 8-bit RGB picture with its first channel in all three."""
    from PIL import Image

    return Image.merge("RGB", [picture.getchannel(0)] * 3)


def to_pil(picture: Any) -> Image:
    """Open a path or take a PIL picture; 8-bit RGB, upright.

    EXIF orientation is applied, palettes, grey, CMYK and 16-bit pictures are converted, alpha is laid on white; of
    several frames the first counts. A picture is decoded only if it has at most `MAX_PIXELS` pixels, so that memory
    stays bounded.

    Raises:
        FileNotFoundError: No such file.
        PictureError: Not a picture, damaged, or too large; the message names the file.
    """
    if not isinstance(picture, (str, Path)):
        return _to_rgb(_upright(picture, "the picture"))
    if not Path(picture).is_file():
        raise FileNotFoundError(f"There is no picture {str(picture)!r}.")
    return _opened(picture, str(picture))


def decode(data: bytes, name: str) -> Image:
    """The bytes of a picture file as `to_pil` gives the file.

    Raises:
        PictureError: Not a picture, damaged, or too large; the message has `name` in it.
    """
    return _opened(io.BytesIO(data), name)


def _opened(source: str | Path | io.BytesIO, name: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with _no_warnings(), Image.open(source) as found:
            return _to_rgb(_upright(found, name))
    except PictureError:
        raise
    except Image.DecompressionBombError as err:  # Pillow's own limit, met while it reads the header
        raise PictureError(f"{name} is too large: {err}") from err
    except UnidentifiedImageError as err:
        raise PictureError(f"{name} is not a picture that Pillow reads.") from err
    except PermissionError as err:
        raise PictureError(f"{name} cannot be read: {err.strerror}.") from err
    except _DAMAGE as err:
        raise PictureError(f"{name} is damaged or not fully written: {_one_line(err)}") from err


def _one_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).split("\n", 1)[0]


def _upright(picture: Image, name: str) -> Image:
    """The picture turned as its EXIF says; sizes above the limit are refused before anything is decoded."""
    from PIL import ImageOps

    if picture.width * picture.height > MAX_PIXELS:
        raise PictureError(
            f"{name} has {picture.width}x{picture.height} pixels; up to {MAX_PIXELS // 10**6} million are read. "
            "Make it smaller."
        )
    if picture.getexif().get(_ORIENTATION, 1) == 1:
        return picture  # exif_transpose would copy
    return ImageOps.exif_transpose(picture)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence Pillow about size, where `MAX_PIXELS` decides, and about unreadable EXIF.

    Only in the main thread: the filters are global, so a data thread would swallow everybody's warnings, and two
    threads that restore them in the wrong order would leave them off for good.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _to_rgb(picture: Image) -> Image:
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(picture))).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba)
        return white
    return picture.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Integers are 16-bit samples; floats span [0, 1], [0, 255] or [0, 65535], the smallest that holds them."""
    parts = np.array_split(values.reshape(-1), values.size // _PART + 1)  # float copies of a part, not of the picture
    tops = (65535.0,) if values.dtype.kind in "iu" else (1.0, 255.0, 65535.0)
    peak = max(float(_finite(part).max(initial=0.0)) for part in parts) if len(tops) > 1 else 0.0
    top = next((t for t in tops if peak <= t), tops[-1])
    scaled = [np.clip(_finite(part) / top * 255 + 0.5, 0, 255).astype(np.uint8) for part in parts]
    return np.concatenate(scaled).reshape(values.shape)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def pil_to_tensor(picture: Image) -> Tensor:
    """8-bit RGB picture -> float in [0, 1], (3, H, W)."""
    array = np.array(picture, dtype=np.uint8)  # (H, W, 3)
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(255)


def to_tensor(images: Any, preprocess: Preprocess, *, any_size: bool = False) -> Tensor:
    """Whatever a user gives as a batch of float RGB pictures in [0, 1], (B, 3, H, W).

    Args:
        images: A float tensor in [0, 1] or uint8 tensor, (B, 3, H, W) or (3, H, W); a PIL picture; a path; or a list
            of these. Pictures and paths are preprocessed; tensors must already have the right size.
        preprocess: Size, crop and filter of the model.
        any_size: Whether the model takes tensors of every size.

    Raises:
        ValueError: A tensor of the wrong size or range, or an empty batch.
        TypeError: Something else.
    """
    if isinstance(images, Tensor):
        batch = images.unsqueeze(0) if images.ndim == 3 else images
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch
        if not batch.is_floating_point():
            raise TypeError(f"Image tensors are float in [0, 1] or uint8, got {batch.dtype}.")
        preprocess.check(batch, any_size=any_size)
        return batch
    if isinstance(images, Sequence) and not isinstance(images, str):
        if not images:
            raise ValueError("The list of pictures is empty.")
        parts = [to_tensor(image, preprocess, any_size=any_size) for image in images]
        if len({p.shape[1:] for p in parts}) > 1:
            raise ValueError(
                "These pictures have different sizes, so they cannot form one batch. Encode them one by one."
            )
        return torch.cat(parts)
    if isinstance(images, (str, Path)) or hasattr(images, "getbands"):
        one = preprocess(images).unsqueeze(0)
        preprocess.check(one, any_size=any_size)
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


def save_png(picture: Image, path: str | Path) -> None:
    """Write a picture as PNG, atomically."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    write_atomic(path, data.getvalue())


def find_pictures(source: str | Path) -> list[Path]:
    """Picture files of a path, a folder (recursively) or a glob pattern, sorted.

    Raises:
        FileNotFoundError: Nothing there; says what was looked for.
    """
    return find_files(source, EXTENSIONS, "pictures")


def find_files(source: str | Path, extensions: Sequence[str], what: str) -> list[Path]:
    """Files of a path, a folder (recursively, by extension, hidden ones left out) or a glob pattern, sorted.

    Args:
        source: What the user wrote; a file that exists is taken whatever its name.
        extensions: Endings that count inside a folder, lower case with the dot.
        what: What is looked for, for the message.

    Raises:
        FileNotFoundError: Nothing there; says what was looked for.
    """
    import glob

    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in extensions and _is_visible_file(p))
    else:
        found = sorted(Path(p) for p in glob.glob(str(source), recursive=True) if Path(p).is_file())
    if not found and path.is_dir():
        raise FileNotFoundError(f"There are no {what} in {str(source)!r} (looked for {', '.join(extensions)}).")
    if not found:
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}, and no file fits it as a pattern.")
    return found


def _is_visible_file(path: Path) -> bool:
    return not path.name.startswith(".") and path.is_file()


def read_batches(
    paths: Sequence[Path], preprocess: Preprocess, batch: int, *, broken: dict[Path, str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Preprocessed pictures in batches of one size each, in order.

    Args:
        paths: Picture files.
        preprocess: Size, crop and filter of the model.
        batch: Most pictures in a batch; a new batch also begins where the size changes.
        broken: Receives each file that cannot be used, with the reason; it is left out.

    Yields:
        The files of a batch and their pictures, float in [0, 1], (B, 3, H, W).
    """
    files: list[Path] = []
    pictures: list[Tensor] = []
    for path in paths:
        try:
            picture = to_tensor(path, preprocess)[0]
        except (PictureError, OSError, ValueError) as err:
            broken[path] = _one_line(err)
            continue
        if pictures and (len(pictures) == batch or pictures[0].shape != picture.shape):
            yield files, torch.stack(pictures)
            files, pictures = [], []
        files.append(path)
        pictures.append(picture)
    if pictures:
        yield files, torch.stack(pictures)
