"""Pictures in: whatever Pillow reads, resized as torchvision would, and one clear line for what cannot be used."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.image import (
    MAX_PIXELS,
    PictureError,
    Preprocess,
    _to_8_bit,
    find_pictures,
    read_batches,
    to_pictures,
    to_pil,
    to_tensor,
    to_uint8,
)

STEP = 1 / 255


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array[..., 0] if channels == 1 else array, mode if channels == 2 else None)


def as_torchvision(picture: Image.Image, size: int | tuple[int, int]) -> torch.Tensor:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

    short = size if isinstance(size, int) else min(size)
    return Compose([Resize(short, InterpolationMode.BICUBIC, antialias=True), CenterCrop(short), ToTensor()])(picture)


@pytest.mark.parametrize(
    "shape", [(300, 200), (200, 300), (64, 64), (65, 64), (1000, 70), (33, 300), (451, 300), (63, 40), (7, 5)]
)
def test_center_crop_equals_torchvision(shape: tuple[int, int]) -> None:
    picture = noise(*shape)
    assert torch.equal(Preprocess(size=(64, 64))(picture), as_torchvision(picture, 64))


@pytest.mark.parametrize("index", [1, 8, 20])
def test_photographs_are_cropped_as_torchvision_does(photos: list[Path], index: int) -> None:
    found = Preprocess(size=(128, 128))(photos[index])
    assert torch.equal(found, as_torchvision(Image.open(photos[index]).convert("RGB"), 128))


@pytest.mark.parametrize("shape", [(70, 2000), (2000, 70)])
def test_strips_are_cropped_as_torchvision_does_up_to_rounding(shape: tuple[int, int]) -> None:
    smooth = noise(*(s // 10 for s in shape)).resize(shape, Image.Resampling.BICUBIC)
    found = Preprocess(size=(64, 64))(smooth)
    assert (found - as_torchvision(smooth, 64)).abs().max() <= STEP + 1e-6


def test_a_picture_of_the_right_size_is_left_exactly_alone() -> None:
    picture = noise(64, 48)
    assert Preprocess(size=(48, 64)).resize(picture).tobytes() == picture.tobytes()


def test_a_tall_crop_keeps_the_aspect_ratio() -> None:
    stripes = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))  # brightness = column
    found = to_uint8(Preprocess(size=(100, 50), resample="box")(stripes))
    assert found.shape == (3, 100, 50)
    assert found[0, 0].tolist() == list(range(75, 125))


def test_squash_shows_the_whole_picture() -> None:
    stripes = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    found = to_uint8(Preprocess(size=(50, 50), crop="squash", resample="box")(stripes))
    assert (int(found[0, 0, 0]), int(found[0, 0, -1])) == (2, 198)


def test_without_a_crop_the_size_stays() -> None:
    assert Preprocess(crop="none", multiple=8)(noise(40, 24)).shape == (3, 24, 40)


@pytest.mark.parametrize("size", [(0, 4), (4,), (1, 2, 3)])
def test_an_impossible_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="A size is"):
        Preprocess(size=size)


def test_a_size_from_json_is_a_tuple() -> None:
    assert Preprocess(size=[3, 4]).size == (3, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 1), (60000, 1), (1, 60000), (3, 20000)])
def test_extreme_shapes_become_the_trained_size(shape: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", shape, (10, 20, 30)).save(tmp_path / "extreme.png")
    found = Preprocess(size=(64, 64))(tmp_path / "extreme.png")
    assert to_uint8(found).flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]


# -- what Pillow reads ---------------------------------------------------------------------------------------------


def corner(path: Path) -> tuple[int, ...]:
    return to_pil(path).getpixel((0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (16, 24), "white")
    upright.paste((255, 0, 0), (0, 0, 8, 8))
    turned = {  # how the sensor saw it
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turned[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    found = to_pil(tmp_path / "turned.png")
    assert found.size == (16, 24)
    assert found.tobytes() == upright.tobytes()


def test_unreadable_exif_is_no_reason_to_refuse(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    noise(16, 16).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert to_pil(tmp_path / "a.jpg").size == (16, 16)
    assert len(recwarn) == 0


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (200, 10, 60)).quantize(2).save(tmp_path / "a.png")
    assert corner(tmp_path / "a.png") == (200, 10, 60)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (200, 10, 60, 255), (200, 10, 60)),
        ("RGBA", (200, 10, 60, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (40, 255), (40, 40, 40)),
        ("LA", (40, 0), (255, 255, 255)),
        ("L", 40, (40, 40, 40)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_alpha_lies_on_white_and_grey_becomes_rgb(tmp_path: Path, mode: str, colour: Any, expected: Any) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    assert corner(tmp_path / "a.png") == expected


def test_a_transparent_palette_entry_lies_on_white(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([9, 9, 9, 8, 8, 8])
    picture.save(tmp_path / "a.png", transparency=0)
    assert corner(tmp_path / "a.png") == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (65535, 255), (32768, 128), (257 * 77, 77)])
def test_16_bit_grey_is_scaled_not_cut(tmp_path: Path, value: int, expected: int) -> None:
    Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / "a.png")
    assert corner(tmp_path / "a.png") == (expected,) * 3


@pytest.mark.parametrize(("peak", "value", "expected"), [(1.0, 0.5, 128), (255.0, 77.0, 77), (65535.0, 257.0 * 77, 77)])
def test_float_pictures_are_scaled_by_the_range_they_use(
    tmp_path: Path, peak: float, value: float, expected: int
) -> None:
    array = np.full((4, 4), value, dtype=np.float32)
    array[3] = [peak, np.nan, np.inf, -np.inf]
    Image.fromarray(array).save(tmp_path / "a.tiff")
    assert corner(tmp_path / "a.tiff") == (expected,) * 3


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = corner(tmp_path / "a.jpg")
    assert red > 250
    assert max(green, blue) < 5


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert corner(tmp_path / "a.gif") == (255, 0, 0)


@pytest.mark.parametrize("extension", ["webp", "avif", "bmp", "tiff", "ppm", "jp2"])
def test_the_formats_of_the_bundled_pillow_are_read(tmp_path: Path, extension: str) -> None:
    Image.new("RGB", (64, 64), (200, 10, 60)).save(tmp_path / f"a.{extension}")
    assert np.abs(np.subtract(corner(tmp_path / f"a.{extension}"), (200, 10, 60))).max() <= 6


def test_the_content_decides_not_the_extension(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", tmp_path / "a.jpg")
    assert to_pil(tmp_path / "a.jpg").size == (8, 8)


def test_a_pil_picture_is_not_changed() -> None:
    picture = noise(8, 8, "RGBA")
    before = picture.tobytes()
    to_pil(picture)
    assert (picture.mode, picture.tobytes()) == ("RGBA", before)


# -- what cannot be used -------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG that only says how large it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused(path: Path) -> str:
    with pytest.raises(PictureError, match=re.escape(str(path))) as caught:
        to_pil(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif", "tiff", "bmp", "avif", "jp2"])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is damaged or not fully written" in refused(path) or "is not a picture" in refused(path)


def test_text_with_the_name_of_a_picture_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture at all")
    assert refused(tmp_path / "a.jpg").endswith("is not a picture that Pillow reads.")


def test_an_empty_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    assert refused(tmp_path / "a.jpg").endswith("is not a picture that Pillow reads.")


@pytest.mark.parametrize("size", [(11000, 11000), (60000, 60000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    assert size[0] * size[1] > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(png(*size))
    assert re.search(r"\d+x\d+ pixels; up to 120 million|is too large", refused(tmp_path / "bomb.png"))


def test_a_missing_picture_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no picture '.*none.png'"):
        to_pil(tmp_path / "none.png")


# -- tensors -------------------------------------------------------------------------------------------------------

SMALL = Preprocess(size=(8, 8))


def test_paths_pictures_and_tensors_form_one_batch(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    batch = to_tensor([tmp_path / "a.png", str(tmp_path / "a.png"), noise(8, 8), SMALL(noise(8, 8))], SMALL)
    assert batch.shape == (4, 3, 8, 8)
    assert torch.equal(batch, batch[:1].expand_as(batch))


def test_uint8_tensors_are_scaled() -> None:
    assert float(to_tensor(torch.full((3, 8, 8), 255, dtype=torch.uint8), SMALL).min()) == 1.0


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8), ValueError, r"\(B, 3, H, W\) and got \(2, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 9), ValueError, "takes 8x8 and got a tensor of 8x9"),
        (torch.zeros(0, 3, 8, 8), ValueError, "batch is empty"),
        (torch.full((1, 3, 8, 8), 1.5), ValueError, r"span \[1.5, 1.5\]"),
        (torch.full((1, 3, 8, 8), -0.1), ValueError, r"span \[-0.1, -0.1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "span"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), TypeError, "float in .0, 1. or uint8, got torch.int64"),
        ([], ValueError, "list of pictures is empty"),
        (3, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_tensor(images, SMALL)


def test_free_sizes_must_be_multiples() -> None:
    with pytest.raises(ValueError, match="multiples of 8, got 8x12"):
        to_tensor(torch.zeros(1, 3, 8, 12), Preprocess(crop="none", multiple=8))


def test_free_sizes_that_differ_are_no_batch() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        to_tensor([noise(8, 8), noise(16, 8)], Preprocess(crop="none", multiple=8))


def test_rounding_is_to_nearest_and_clamped() -> None:
    values = torch.tensor([-1.0, 0.0, 0.4999 * STEP, 0.5001 * STEP, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_pictures_survive_tensors() -> None:
    picture = noise(8, 8)
    assert to_pictures(to_tensor(picture, SMALL))[0].tobytes() == picture.tobytes()


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_picture_one_may_not_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(8, 8).save(tmp_path / "a.png")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(PictureError, match="a.png cannot be read: Permission denied"):
        to_pil(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_large_deep_picture_is_converted_in_parts(dtype: type) -> None:
    values = (np.arange(2**23) % 60_000).astype(dtype).reshape(2**13, 2**10)
    tracemalloc.start()
    found = _to_8_bit(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, (values / 65535 * 255 + 0.5).astype(np.uint8))
    assert peak < 4 * values.size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.JPG", "a.png", "inner/c.webp", ".hidden.png", "notes.txt", "dir.png/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder_gives_its_pictures_sorted(folder: Path) -> None:
    assert [p.relative_to(folder).as_posix() for p in find_pictures(folder)] == ["a.png", "b.JPG", "inner/c.webp"]


def test_a_pattern_gives_what_fits(folder: Path) -> None:
    assert [p.name for p in find_pictures(str(folder / "**" / "*.webp"))] == ["c.webp"]


def test_a_file_gives_itself_whatever_its_name(folder: Path) -> None:
    assert find_pictures(folder / "notes.txt") == [folder / "notes.txt"]


@pytest.mark.parametrize(("name", "message"), [("dir.png", "no pictures in"), ("*.bmp", "no file or folder")])
def test_nothing_found_is_said(folder: Path, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        find_pictures(folder / name)


def test_batches_keep_the_order_and_name_what_is_broken(tmp_path: Path) -> None:
    for i in range(5):
        noise(8, 8, seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("broken")
    broken: dict[Path, str] = {}
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "missing.png"]
    found = list(read_batches(paths, SMALL, 3, broken=broken))
    assert [[f.name for f in files] for files, _ in found] == [["0.png", "1.png", "3.png"], ["4.png"]]
    assert torch.equal(found[0][1][2], SMALL(noise(8, 8, seed=3)))
    assert [p.name for p in broken] == ["2.png", "missing.png"]


def test_a_batch_ends_where_the_size_changes(tmp_path: Path) -> None:
    for i, width in enumerate((8, 8, 16)):
        noise(width, 8).save(tmp_path / f"{i}.png")
    found = read_batches(sorted(tmp_path.iterdir()), Preprocess(crop="none", multiple=8), 9, broken={})
    assert [tuple(pictures.shape) for _, pictures in found] == [(2, 3, 8, 8), (1, 3, 8, 16)]
