"""`Tokens`, what every tokenizer returns; exact packing of ids; the `.vtok` container."""

from __future__ import annotations

import binascii
import dataclasses
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vistok.hub import write_atomic


class Prior(Protocol):
    """What the container needs of an entropy coder; see `vistok.codec.prior.Prior`."""

    tokens: int

    @property
    def check(self) -> int:
        """16 bits that name the prior."""

    def encode(self, ids: Tensor) -> bytes:
        """Ids of one picture as bytes."""

    def decode(self, data: bytes, k: int) -> Tensor:
        """Inverse of `encode` for k tokens."""


MAGIC = b"VT"
NAMELESS = "00000000"
"""A model id for containers that are made to be measured."""
VERSION = 2
FLAG_TEXT, FLAG_CODED, FLAG_SIZE = 1, 2, 4
LARGEST = 0xFFFF  # sizes, tokens, bytes of a caption
HEADER = struct.Struct(">2sB4sH")  # magic, version and flags, model id, CRC-16 of everything else


class ContainerError(ValueError):
    """A `.vtok` file that is damaged, or that another model wrote."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of a batch of pictures.

    `tokens[i]`, `tokens[i:j]` and iteration give batches of fewer pictures; `tokens[:, :k]` keeps the first k tokens
    of every row.

    Attributes:
        ids: Token ids, int64, (B, N) or (B, N, G) for grouped ids; None for continuous latents. Never negative:
            positions beyond a row's length hold 0.
        codes: Quantised vectors or continuous latents, (B, N, D); None if not kept.
        grid: (h, w) or (t, h, w) with product N for tokens that lie on a grid, None for 1D tokens.
        lengths: Valid tokens of each row, int64, (B,).
        vocab: Number of ids of each group, one entry per group; () for continuous latents.
        size: (H, W) of the picture before padding, None if unknown.
        text: One caption per row where decoding needs it.
    """

    ids: Tensor | None
    codes: Tensor | None = None
    grid: tuple[int, ...] | None = None
    lengths: Tensor = None  # type: ignore[assignment]  # filled below: the full length by default
    vocab: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    text: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.ids is None and self.codes is None:
            raise ValueError("Tokens need ids or codes.")
        if self.ids is not None:
            self._check_ids(self.ids)
        if self.grid is not None and math.prod(self.grid) != self.num_tokens:
            raise ValueError(f"A grid of {self.grid} holds {math.prod(self.grid)} tokens, not {self.num_tokens}.")
        if self.text is not None and len(self.text) != len(self):
            raise ValueError(
                f"There are {len(self)} pictures and {len(self.text)} captions; give one caption per picture."
            )
        if self.lengths is None:
            full = torch.full((len(self),), self.num_tokens, dtype=torch.int64, device=self._any.device)
            object.__setattr__(self, "lengths", full)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dtype != torch.int64:
            raise TypeError(f"Token ids are int64 and got {ids.dtype}. Convert with ids.long().")
        if ids.ndim not in (2, 3):
            raise ValueError(f"Token ids are (B, N) or (B, N, G) and got {tuple(ids.shape)}; keep the grid in `grid`.")
        groups = 1 if ids.ndim == 2 else ids.shape[2]
        if self.vocab and len(self.vocab) != groups:
            raise ValueError(f"These ids have {groups} groups and the vocabulary {len(self.vocab)}: {self.vocab}.")

    @property
    def _any(self) -> Tensor:
        found = self.codes if self.ids is None else self.ids
        assert found is not None
        return found

    @property
    def num_tokens(self) -> int:
        """Positions per row, N (padding included)."""
        return self._any.shape[1]

    @property
    def bits(self) -> float:
        """Bits per token; 0 for continuous latents."""
        return float(sum(math.log2(v) for v in self.vocab))

    @property
    def mask(self) -> Tensor:
        """True at valid positions, (B, N)."""
        return torch.arange(self.num_tokens, device=self.lengths.device) < self.lengths.unsqueeze(1)

    def __len__(self) -> int:
        return self._any.shape[0]

    def __getitem__(self, index: Any) -> Tokens:
        """Rows by number, slice, list or mask; a prefix `[:, :k]` of 1D tokens. Always a batch, also for one row.

        Raises:
            IndexError: No such row, or columns that are not a prefix.
        """
        rows, columns = index if isinstance(index, tuple) and len(index) == 2 else (index, slice(None))
        n = self.num_tokens
        start, stop, step = columns.indices(n) if isinstance(columns, slice) else (1, 0, 1)
        if start != 0 or step != 1:
            raise IndexError(
                "The second index of tokens is a prefix such as tokens[:, :32]; other positions cannot be picked."
            )
        if stop < n and self.grid is not None:
            raise IndexError(f"These tokens lie on a {self.grid} grid: a prefix of them is not a shorter code.")
        chosen = torch.arange(len(self))[rows].reshape(-1)  # an IndexError for a row that is not there
        chosen = chosen.to(self.lengths.device)
        picked: dict[str, Any] = {"lengths": self.lengths[chosen].clamp_max(stop)}
        for name in ("ids", "codes"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[chosen][:, :stop]
        if self.text is not None:
            picked["text"] = tuple(self.text[i] for i in chosen.tolist())
        return dataclasses.replace(self, **picked)

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device."""
        moved = {n: v.to(device) for n in ("ids", "codes", "lengths") if (v := getattr(self, n)) is not None}
        return dataclasses.replace(self, **moved)

    def __repr__(self) -> str:
        lengths = sorted(set(self.lengths.tolist())) or [0]
        span = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]}..{lengths[-1]}"
        kind = f"{self.bits:g} bits each" if self.vocab else f"continuous, {self._any.shape[-1]} channels"
        grid = f", grid {'x'.join(map(str, self.grid))}" if self.grid else ""
        return f"Tokens({len(self)} x {span} tokens, {kind}{grid})"


def packed_bytes(n: int, vocab: Sequence[int]) -> int:
    """Bytes that n tokens take when packed: ceil(n * log2(product of vocab) / 8), exact."""
    return (math.prod(vocab) ** n - 1).bit_length() + 7 >> 3 if n else 0


def pack(ids: Tensor, vocab: Sequence[int]) -> bytes:
    """Pack the ids of one picture at their exact width.

    The ids, group by group within token after token, are the digits of one mixed-radix number, the first digit least
    significant, written little-endian. For vocabularies that are powers of two this is plain bit packing.

    Args:
        ids: int64, (N,) or (N, G).
        vocab: Number of ids of each group, G entries.

    Returns:
        `packed_bytes(N, vocab)` bytes.

    Raises:
        ValueError: Not ids of that vocabulary.
    """
    rows = (ids.unsqueeze(-1) if ids.ndim == 1 else ids).cpu()  # (N, G)
    if rows.ndim != 2 or rows.shape[1] != len(vocab):
        raise ValueError(
            f"Ids of {tuple(ids.shape)} do not have the {len(vocab)} groups of the vocabulary {tuple(vocab)}."
        )
    top = torch.tensor([v - 1 for v in vocab], dtype=torch.int64)
    if rows.numel() and bool(((rows < 0) | (rows > top)).any()):
        raise ValueError(f"An id lies outside 0..{max(vocab) - 1} (seen {int(rows.min())}..{int(rows.max())}).")
    value = _join([_join_groups(row, vocab) for row in rows.tolist()], math.prod(vocab))
    return value.to_bytes(packed_bytes(len(rows), vocab), "little")


def unpack(data: bytes, n: int, vocab: Sequence[int]) -> Tensor:
    """Inverse of `pack`: int64 ids, (n,) for one group, (n, G) for several.

    Raises:
        ValueError: Wrong number of bytes, or bytes that no ids give.
    """
    if len(data) != packed_bytes(n, vocab):
        raise ValueError(f"{n} tokens of this vocabulary take {packed_bytes(n, vocab)} bytes, got {len(data)}.")
    value = int.from_bytes(data, "little")
    if value >= math.prod(vocab) ** n:
        raise ValueError("The bytes hold no valid ids of this vocabulary.")
    rows = [_split_groups(token, vocab) for token in _split(value, math.prod(vocab), n)]
    ids = torch.tensor(rows, dtype=torch.int64).view(n, len(vocab))
    return ids.view(n) if len(vocab) == 1 else ids


def _join_groups(digits: Sequence[int], radices: Sequence[int]) -> int:
    value = 0
    for digit, radix in zip(reversed(digits), reversed(radices)):
        value = value * radix + digit
    return value


def _split_groups(value: int, radices: Sequence[int]) -> list[int]:
    digits = []
    for radix in radices:
        value, digit = divmod(value, radix)
        digits.append(digit)
    return digits


def _join(digits: list[int], base: int) -> int:
    """The number with these digits, the first least significant; halving keeps products of big numbers few."""
    if len(digits) <= 1:
        return digits[0] if digits else 0
    half = len(digits) // 2
    radix: int = base**half
    return _join(digits[:half], base) + _join(digits[half:], base) * radix


def _split(value: int, base: int, n: int) -> list[int]:
    """Inverse of `_join` for n digits."""
    if n <= 1:
        return [value][:n]
    half = n // 2
    if base & (base - 1) == 0:  # a power of two: shifts are linear where divisions of big numbers are quadratic
        shift = half * (base.bit_length() - 1)
        high, low = value >> shift, value & ((1 << shift) - 1)
    else:
        high, low = divmod(value, base**half)
    return _split(low, base, half) + _split(high, base, n - half)


def to_bytes(tokens: Tokens, model_id: str, prior: Prior | None = None) -> bytes:
    """One picture's tokens as a `.vtok` container.

    Big-endian: `VT`; version (upper 4 bits) and flags (bit 0: a caption, bit 1: entropy-coded, bit 2: a size); 4 bytes
    of model id; CRC-16 (CCITT, start 0, or the prior's own 16 bits if entropy-coded) over everything else. Then whole
    numbers of 7 bits a byte, lowest first, the top bit set in all but the last: the number of tokens K; if flagged,
    height and width; if flagged, the length of the caption, and the caption in UTF-8. Then the packed ids, or the range
    coder's bytes where those are fewer. 10 bytes and the ids for fewer than 128 tokens of a picture of known size.

    Args:
        tokens: A batch of one picture with ids.
        model_id: 8 hex digits that name the encoder's weights.
        prior: The model's prior, for entropy coding; None packs the ids at their width.

    Raises:
        ValueError: More than one picture, no ids, ids outside the vocabulary, a number above 65,535, or a model id
            that is not 8 hex digits.
    """
    if tokens.ids is None:
        raise ValueError(f"A container holds ids, and these tokens are continuous: {tokens!r}.")
    if len(tokens) != 1:
        raise ValueError(f"A container holds one picture, got {tokens!r}. Save tokens[i] one by one.")
    if not re.fullmatch("[0-9a-f]{8}", model_id):
        raise ValueError(f"A model id is 8 hex digits, got {model_id!r}.")
    k = int(tokens.lengths[0])
    height, width = tokens.size or (0, 0)
    if max(height, width, k) > LARGEST:
        raise ValueError(f"A container holds sizes and counts up to {LARGEST}, got {height}x{width} with {k} tokens.")
    body, flags, start = pack(tokens.ids[0, :k].cpu(), tokens.vocab), 0, 0
    if prior is not None and k <= prior.tokens and len(coded := prior.encode(tokens.ids[0, :k].cpu())) < len(body):
        body, flags, start = coded, FLAG_CODED, prior.check
    flags |= FLAG_SIZE * (tokens.size is not None) | FLAG_TEXT * (tokens.text is not None)
    body = _front(tokens, k) + body
    head = HEADER.pack(MAGIC, VERSION << 4 | flags, bytes.fromhex(model_id), 0)[:-2]
    return head + struct.pack(">H", binascii.crc_hqx(head + body, start)) + body


def is_coded(data: bytes) -> bool:
    """Whether the ids of a container are entropy-coded."""
    return bool(data[2] & FLAG_CODED)


def overhead(tokens: Tokens, k: int) -> int:
    """Bytes of a container of the first k tokens of one picture beside its ids."""
    return HEADER.size + len(_front(tokens, k))


def _front(tokens: Tokens, k: int) -> bytes:
    """What a container has between header and ids."""
    caption = b"" if tokens.text is None else tokens.text[0].encode()
    if len(caption) > LARGEST:
        raise ValueError(f"A caption takes at most {LARGEST} bytes, got {len(caption)}.")
    numbers = [k, *(tokens.size or ()), *([] if tokens.text is None else [len(caption)])]
    return b"".join(map(_number, numbers)) + caption


def _number(value: int) -> bytes:
    """A whole number, 7 bits a byte, lowest first."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _number(rest) if rest else bytes([low])


def _read_number(data: bytes) -> tuple[int, bytes]:
    """Inverse of `_number`: the number and the bytes behind it."""
    value = 0
    for i, byte in enumerate(data[:3]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, data[i + 1 :]
    raise ContainerError("This .vtok file is damaged: a number has no end.")


def from_bytes(
    data: bytes,
    *,
    vocab: Sequence[int],
    model_id: str,
    grid: tuple[int, ...] | None = None,
    prior: Prior | None = None,
) -> Tokens:
    """Read a `.vtok` container written by `to_bytes`.

    Args:
        data: The whole file.
        vocab: Vocabulary of the model that is to decode it.
        model_id: 8 hex digits of that model.
        grid: Grid of the tokens, if the model has one.
        prior: The model's prior; entropy-coded files cannot be read without.

    Raises:
        ContainerError: Not a container, damaged, of a newer version, or written by another model or prior.
        ImportError: The file is entropy-coded and the range coder is not installed.
    """
    if len(data) < HEADER.size or data[:2] != MAGIC:
        raise ContainerError("This is not a .vtok file (it does not start with a vistok header).")
    _, version, found_id, crc = HEADER.unpack_from(data)
    version, flags = version >> 4, version & 0xF
    head, body = data[: HEADER.size - 2], data[HEADER.size :]
    if version != VERSION or flags & ~(FLAG_TEXT | FLAG_CODED | FLAG_SIZE):
        raise ContainerError(
            f"This .vtok file is of version {version}, flags {flags}; this vistok reads version {VERSION}."
        )
    coded = bool(flags & FLAG_CODED)
    if found_id.hex() != model_id and (coded or binascii.crc_hqx(head + body, 0) == crc):
        raise ContainerError(
            f"Model {found_id.hex()} wrote this .vtok file; the one given is {model_id}. Give the same weights."
        )
    if coded and prior is None:
        raise ContainerError(
            "This .vtok file is entropy-coded and the model given has no prior (prior.npz beside its weights)."
        )
    if binascii.crc_hqx(head + body, prior.check if coded and prior is not None else 0) != crc:
        raise ContainerError(
            "This .vtok file is damaged: its checksum does not fit (flipped bits or a truncated file)"
            + (", or it was coded with another prior." if coded else ".")
        )
    (k, body), size, text = _read_number(body), None, None
    if flags & FLAG_SIZE:
        height, body = _read_number(body)
        width, body = _read_number(body)
        size = (height, width)
    if flags & FLAG_TEXT:
        length, body = _read_number(body)
        text, body = (body[:length].decode(errors="replace"),), body[length:]
    try:
        ids = (prior.decode(body, k) if coded and prior is not None else unpack(body, k, vocab)).unsqueeze(0)
        return Tokens(ids=ids, vocab=tuple(vocab), grid=grid, size=size, text=text)
    except ValueError as err:
        raise ContainerError(f"This .vtok file is damaged: {err}") from err


def save(tokens: Tokens, path: str | Path, model_id: str, prior: Prior | None = None) -> int:
    """Write one picture's tokens as `path`, atomically; returns the number of bytes. See `to_bytes`."""
    data = to_bytes(tokens, model_id, prior)
    write_atomic(path, data)
    return len(data)


def load(
    path: str | Path,
    *,
    vocab: Sequence[int],
    model_id: str,
    grid: tuple[int, ...] | None = None,
    prior: Prior | None = None,
) -> Tokens:
    """Read a `.vtok` file. See `from_bytes`; its errors start with the file's name here.

    Raises:
        FileNotFoundError: No such file.
        ContainerError: Not a container, damaged, or written by another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        return from_bytes(Path(path).read_bytes(), vocab=vocab, model_id=model_id, grid=grid, prior=prior)
    except ContainerError as err:
        raise ContainerError(f"{path}: {err}") from err


def stack(parts: Sequence[Tokens]) -> Tokens:
    """Several token batches as one; shorter rows are padded with 0 and keep their length.

    Args:
        parts: Tokens of one model: same vocabulary, grid and picture size; ids with or without codes.

    Raises:
        ValueError: Nothing given, or tokens that do not belong into one batch.
    """
    if not parts:
        raise ValueError("There are no tokens to stack.")
    kinds = {(p.vocab, p.grid, p.size, p.text is None, p.ids is None, p.codes is None) for p in parts}
    if len(kinds) > 1:
        raise ValueError(
            "These tokens differ in vocabulary, grid, picture size or kind, so they cannot form one batch."
        )
    n = max(p.num_tokens for p in parts)

    def column(name: str) -> Tensor | None:
        values = [getattr(p, name) for p in parts]
        if values[0] is None:
            return None
        padded = [torch.cat([v, v.new_zeros(v.shape[0], n - v.shape[1], *v.shape[2:])], 1) for v in values]
        return torch.cat(padded)

    text = None if parts[0].text is None else tuple(t for p in parts for t in p.text or ())
    lengths = torch.cat([p.lengths for p in parts])
    return dataclasses.replace(parts[0], ids=column("ids"), codes=column("codes"), lengths=lengths, text=text)
