"""Damaged and hostile files: one clear line, exit code 2, nothing written."""

import contextlib
import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import vistok
from vistok.cli import run
from vistok.data.bundled import FOLDER
from vistok.image import to_tensor

MODEL = "spectral_planes_128.free"


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One of: bits flipped, cut short, bytes inserted, a stretch overwritten."""
    raw, kind = bytearray(data), rng.integers(4)
    at = int(rng.integers(len(raw)))
    if kind == 0:
        for bit in rng.integers(8 * len(raw), size=rng.integers(1, 6)):
            raw[bit // 8] ^= 1 << int(bit % 8)
    elif kind == 1:
        del raw[at:]
    elif kind == 2:
        raw[at:at] = rng.bytes(int(rng.integers(1, 40)))
    else:
        raw[at : at + 12] = rng.bytes(len(raw[at : at + 12]))
    return bytes(raw)


MEMORY = 400 * 2**20
"""Bytes by which the process may grow over a hostile picture of any kind."""


@contextlib.contextmanager
def bounded():
    """The process grows by at most `MEMORY` inside the block."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def refused(capsys, out, *words: str) -> None:
    """The command ends with 2 and says one line, without a traceback; `out` holds no result."""
    with bounded():
        assert run([*words, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and "Traceback" not in said
    assert not [p for p in out.rglob("*") if p.is_file()] if out.exists() else True


@pytest.mark.slow
def test_200_mutated_token_files_are_refused_one_by_one(tmp_path, capsys):
    tokenizer = vistok.load(MODEL)
    photo = FOLDER / "01-cat.jpg"
    data = tokenizer.to_bytes(tokenizer.encode(to_tensor([photo], tokenizer.preprocess)))
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    for i in range(200):
        changed = mutated(data, rng)
        assert changed != data
        (folder / f"{i:03d}.vtok").write_bytes(changed)
    assert run(["decode", MODEL, str(folder), "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ".vtok" in line]
    assert len(lines) == 200
    assert not list((tmp_path / "out").rglob("*.png"))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated", "bomb", "just too large", "text", "empty", "wrong ending"])
def test_pictures_that_are_none_are_refused(kind, tmp_path, capsys):
    photo = (FOLDER / "01-cat.jpg").read_bytes()
    content = {
        "truncated": photo[: len(photo) // 3],
        "bomb": bomb(60_000, 60_000),
        "just too large": bomb(12_001, 10_000),
        "text": b"not a picture at all",
        "empty": b"",
        "wrong ending": b"VT\x01\x00" + bytes(40),
    }[kind]
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    refused(capsys, tmp_path / "out", "encode", MODEL, str(bad))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (60_000, 2), (3, 500)])
def test_odd_shapes_are_pictures(size, tmp_path):
    Image.new("RGB", size, "red").save(tmp_path / "odd.png")
    with bounded():
        assert run(["encode", MODEL, str(tmp_path / "odd.png"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "odd.vtok").stat().st_size < 200


@pytest.mark.slow
def test_the_ending_of_a_name_does_not_matter(tmp_path):
    for name in ("photo.png", "photo.txt", "photo"):
        (tmp_path / name).write_bytes((FOLDER / "01-cat.jpg").read_bytes())
        out = tmp_path / f"out-{name}"
        assert run(["encode", MODEL, str(tmp_path / name), "--out", str(out)]) == 0
        assert (out / "photo.vtok").is_file()


@pytest.mark.slow
def test_mutated_pictures_are_encoded_or_refused_in_one_line_each(tmp_path, capsys):
    rng, folder, out = np.random.default_rng(2), tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        file = io.BytesIO()
        with Image.open(FOLDER / "01-cat.jpg") as photo:
            photo.resize((96, 72)).save(file, format=kind)
        for i in range(20):
            (folder / f"{kind}-{i:02d}.{kind.lower()}").write_bytes(mutated(file.getvalue(), rng))
    with bounded():
        code = run(["encode", MODEL, str(folder), "--out", str(out)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error:")]
    assert code == 2 and len(lines) > 20
    assert len(list(out.rglob("*.vtok"))) + len(lines) == 100


@pytest.mark.slow
def test_mutated_checkpoints_are_refused(tmp_path, capsys):
    tokenizer = vistok.create("tokenizer", "spectral_planes_tiny").eval()
    rng = np.random.default_rng(1)
    for i in range(20):
        folder = tmp_path / str(i)
        tokenizer.save_pretrained(folder)
        victim = folder / ("config.json" if i % 2 else "model.safetensors")
        data = victim.read_bytes()
        cut = int(rng.integers(min(len(data), 2000)))
        victim.write_bytes(data[:cut] if i % 4 < 2 else data[:cut] + b"\xff\x00{" + data[cut + 3 :])
        refused(capsys, tmp_path / f"out{i}", "encode", str(folder), str(FOLDER / "01-cat.jpg"))
