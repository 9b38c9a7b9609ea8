"""The `.vtok` container: exact size, and every damage is found."""

from __future__ import annotations

import binascii
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok import Tokens
from vistok.tokens import ContainerError, from_bytes, load, overhead, save, to_bytes

MODEL = "0123abcd"
VOCAB = (4096,)


def one(text: tuple[str, ...] | None = None, n: int = 128, **changes: object) -> Tokens:
    ids = torch.randint(4096, (1, n), generator=torch.Generator().manual_seed(n))
    return Tokens(**{"ids": ids, "vocab": VOCAB, "size": (256, 192), "text": text, **changes})


def read(data: bytes, **changes: object) -> Tokens:
    return from_bytes(data, **{"vocab": VOCAB, "model_id": MODEL, **changes})


@pytest.mark.parametrize(("n", "size", "front"), [(127, None, 10), (128, None, 11), (128, (256, 192), 15)])
def test_a_container_is_few_bytes_and_the_ids(n: int, size: tuple[int, int] | None, front: int) -> None:
    tokens = one(n=n, size=size)
    assert len(to_bytes(tokens, MODEL)) == overhead(tokens, n) + -(-n * 12 // 8) == front + -(-n * 12 // 8)


def test_the_header_is_what_the_format_says() -> None:
    data = to_bytes(one(), MODEL)
    crc = binascii.crc_hqx(data[:7] + data[9:], 0)
    front = b"VT\x24" + bytes.fromhex(MODEL) + struct.pack(">H", crc) + bytes([128, 1, 128, 2, 192, 1])
    assert data[:15] == front  # version 2, a size; 128 tokens, 256 rows, 192 columns


@pytest.mark.parametrize("text", [None, ("",), ("a cat, 猫",)])
def test_tokens_survive_the_container(text: tuple[str, ...] | None) -> None:
    found = read(to_bytes(one(text), MODEL))
    assert torch.equal(found.ids, one().ids)
    assert (found.size, found.vocab, found.text, found.grid) == ((256, 192), VOCAB, text, None)


def test_grouped_ids_survive_the_container() -> None:
    ids = torch.randint(256, (1, 64, 8))
    data = to_bytes(Tokens(ids=ids, vocab=(256,) * 8, grid=(8, 8)), MODEL)
    found = read(data, vocab=(256,) * 8, grid=(8, 8))
    assert torch.equal(found.ids, ids)
    assert found.size is None


def test_padding_is_not_written() -> None:
    data = to_bytes(one(lengths=torch.tensor([32])), MODEL)
    assert len(data) == 14 + 48
    assert torch.equal(read(data).ids, one().ids[:, :32])


@given(n=st.integers(0, 40), captioned=st.booleans(), at=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_anywhere_is_found(n: int, captioned: bool, at: float) -> None:
    data = bytearray(to_bytes(one(("a caption",) if captioned else None, n), MODEL))
    bit = int(at * 8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ContainerError):
        read(bytes(data))


@given(n=st.integers(1, 40), captioned=st.booleans(), at=st.floats(0, 1, exclude_max=True))
def test_truncation_anywhere_is_found(n: int, captioned: bool, at: float) -> None:
    data = to_bytes(one(("a caption",) if captioned else None, n), MODEL)
    with pytest.raises(ContainerError):
        read(data[: int(at * len(data))])


@given(st.binary(min_size=1, max_size=8))
def test_appended_bytes_are_found(tail: bytes) -> None:
    with pytest.raises(ContainerError):
        read(to_bytes(one(n=8), MODEL) + tail)


@given(st.binary(max_size=64))
def test_no_bytes_at_all_crash_the_reader(data: bytes) -> None:
    with pytest.raises(ContainerError):
        read(data)


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (to_bytes(one(), MODEL), {"model_id": "ffffffff"}, "Model 0123abcd wrote this .* the one given is ffffffff"),
        (b"\x89PNG" + bytes(40), {}, "not a .vtok file"),
        (b"VT", {}, "not a .vtok file"),
        (b"VT\x11" + to_bytes(one(), MODEL)[3:], {}, "version 1, flags 1; this vistok reads version 2"),
        (to_bytes(one(), MODEL)[:-1], {}, "damaged: its checksum"),
        (to_bytes(one(), MODEL), {"vocab": (8192,)}, "damaged: 128 tokens of this vocabulary take 208 bytes, got 192"),
        (to_bytes(one(), MODEL), {"grid": (3, 3)}, "damaged: A grid"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data: bytes, changes: dict, message: str) -> None:
    with pytest.raises(ContainerError, match=message) as caught:
        read(data, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "model", "message"),
    [
        (Tokens(ids=torch.zeros(2, 4, dtype=torch.int64), vocab=VOCAB), MODEL, "holds one picture, got Tokens"),
        (Tokens(ids=None, codes=torch.zeros(1, 4, 8)), MODEL, "these tokens are continuous"),
        (one(size=(70000, 3)), MODEL, "up to 65535, got 70000x3"),
        (one(text=("x" * 70000,)), MODEL, "caption takes at most 65535 bytes"),
        (one(), "0123ABCD", "8 hex digits"),
        (one(), "0123", "8 hex digits"),
        (one(vocab=(16,)), MODEL, "outside 0..15"),
    ],
)
def test_what_cannot_be_written_is_refused(tokens: Tokens, model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_bytes(tokens, model)


def test_a_saved_file_is_read_back(tmp_path: Path) -> None:
    size = save(one(), tmp_path / "a.vtok", MODEL)
    assert size == (tmp_path / "a.vtok").stat().st_size == 15 + 192
    assert torch.equal(load(tmp_path / "a.vtok", vocab=VOCAB, model_id=MODEL).ids, one().ids)


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.vtok").write_bytes(b"nothing of ours, really")
    with pytest.raises(ContainerError, match=r"bad.vtok: This is not a .vtok file"):
        load(tmp_path / "bad.vtok", vocab=VOCAB, model_id=MODEL)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load(tmp_path / "none.vtok", vocab=VOCAB, model_id=MODEL)
