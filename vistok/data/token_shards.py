"""Files of tokens: what a shard holds, how it is written, and how single rows are read from it.

A shard is a safetensors file, read by memory map, or a WebDataset tar. Both hold the same; either is a function of its
content alone, byte for byte.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from vistok.tokens import Tokens

Format = Literal["safetensors", "webdataset"]
ENDINGS: dict[str, str] = {"safetensors": ".safetensors", "webdataset": ".tar"}
ID_TYPES = (("uint8", 2**8), ("uint16", 2**16), ("int32", 2**31), ("int64", 2**63))
CODE_TYPES = ("float16", "bfloat16", "float32")
_HEADER_NAMES = {"U8": "uint8", "U16": "uint16", "I32": "int32", "I64": "int64", "F16": "float16", "F32": "float32"}
_HEADER_NAMES |= {"BF16": "uint16"}  # numpy has no bfloat16: the bits are taken as they are


class ShardError(ValueError):
    """A shard that is damaged, or not what its manifest says."""


def id_type(vocab: Sequence[int]) -> str:
    """The smallest integer type that holds the ids of a vocabulary, one size per group."""
    return next(name for name, limit in ID_TYPES if max(vocab) <= limit)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the tokens of one picture are stored.

    Attributes:
        kind: `ids`, or `codes` of tokenizers with continuous latents.
        dtype: Type they are stored in.
        tokens: Tokens per picture, N.
        vocab: Number of ids of each group; () for codes.
        channels: Width of the codes, D; 0 for ids.
        grid: Grid of the tokens, None for 1D tokens.
        size: (H, W) of the pictures, None if unknown.
        views: Views (crops, mirror images) of each picture, V.
        text: Whether decoding needs the caption.
    """

    kind: Literal["ids", "codes"]
    dtype: str
    tokens: int
    vocab: tuple[int, ...] = ()
    channels: int = 0
    grid: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None
    views: int = 1
    text: bool = False

    @classmethod
    def of(cls, tokens: Tokens, *, views: int, codes: str, text: bool) -> Layout:
        """The layout of what a tokenizer made; `codes` is the type for continuous latents."""
        common: dict[str, Any] = {"tokens": tokens.num_tokens, "grid": tokens.grid, "size": tokens.size}
        if tokens.ids is not None:
            kind = {"kind": "ids", "dtype": id_type(tokens.vocab), "vocab": tokens.vocab}
        else:
            assert tokens.codes is not None
            kind = {"kind": "codes", "dtype": codes, "channels": tokens.codes.shape[-1]}
        return cls(**kind, **common, views=views, text=text)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """What `to_dict` gave, read from JSON."""
        lists = {k: tuple(values[k]) for k in ("vocab", "grid", "size") if values[k] is not None}
        return cls(**{**values, **lists})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the number of groups."""
        return asdict(self)

    def stored(self, tokens: Tokens) -> Tensor:
        """Tokens in the type they are stored in, on the CPU.

        Raises:
            ValueError: Ids outside the vocabulary, or codes that the type cannot hold.
        """
        dtype = getattr(torch, self.dtype)
        if tokens.ids is not None:
            top = torch.tensor([v - 1 for v in self.vocab], device=tokens.ids.device)
            grouped = tokens.ids if len(self.vocab) > 1 else tokens.ids.unsqueeze(-1)
            if bool(((grouped < 0) | (grouped > top)).any()):
                raise ValueError(f"The tokenizer made ids outside its vocabulary of {max(self.vocab)}.")
            return tokens.ids.cpu().to(dtype)
        assert tokens.codes is not None
        found = tokens.codes.cpu().to(dtype)
        if not bool(torch.isfinite(found.float()).all()):
            largest = float(tokens.codes.abs().max())
            raise ValueError(
                f"Codes reach {largest:.4g}, which {self.dtype} does not hold. Store them as bfloat16 or float32."
            )
        return found

    def tokens_of(self, values: Tensor, lengths: Tensor, text: tuple[str, ...] | None) -> Tokens:
        """Stored rows, (B, N[, W]), as tokens of the tokenizer: ids int64, codes float32."""
        ids = values.to(torch.int64) if self.kind == "ids" else None
        codes = values.float() if self.kind == "codes" else None
        caption = text if self.text else None
        return Tokens(
            ids=ids, codes=codes, grid=self.grid, lengths=lengths, vocab=self.vocab, size=self.size, text=caption
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The content of a shard.

    Attributes:
        values: (n, V, N) or (n, V, N, W), in the stored type.
        lengths: Valid tokens of each view, int64, (n, V).
        keys: What each picture was called in the data set.
        index: Its number there, int64, (n,).
        labels: Class indices, int64, (n,), None if there are none.
        text: Captions, None if there are none.
    """

    values: Tensor
    lengths: Tensor
    keys: tuple[str, ...]
    index: Tensor
    labels: Tensor | None = None
    text: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def short(self) -> bool:
        """Whether some row is shorter than the others."""
        return bool((self.lengths < self.values.shape[2]).any())


def to_bytes(rows: Rows, layout: Layout, form: str) -> bytes:
    """A shard as the bytes of a file.

    Raises:
        ValueError: bfloat16 in a tar, whose members are NumPy arrays.
    """
    return _safetensors(rows, layout) if form == "safetensors" else _tar(rows, layout)


def _safetensors(rows: Rows, layout: Layout) -> bytes:
    from safetensors.torch import save

    tensors = {layout.kind: rows.values.contiguous(), "index": rows.index, **_strings("keys", rows.keys)}
    if rows.short:
        tensors["lengths"] = rows.lengths.to(torch.int32)
    if rows.labels is not None:
        tensors["labels"] = rows.labels
    if rows.text is not None:
        tensors |= _strings("text", rows.text)
    # one entry only: safetensors writes several in an order of its own in every process
    return save(tensors, metadata={"format": "vistok-ids"})


def _strings(name: str, words: Sequence[str]) -> dict[str, Tensor]:
    """Strings as UTF-8 one after the other, and where each ends."""
    data = [word.encode() for word in words]
    joined = torch.from_numpy(np.frombuffer(b"".join(data), dtype=np.uint8).copy())
    return {name: joined, f"{name}_end": torch.tensor(np.cumsum([len(d) for d in data]), dtype=torch.int64)}


def _tar(rows: Rows, layout: Layout) -> bytes:
    if layout.dtype == "bfloat16":
        raise ValueError("A WebDataset shard holds NumPy arrays, which have no bfloat16. Store float16 or float32.")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, key in enumerate(rows.keys):
            array = io.BytesIO()
            np.save(array, rows.values[i].numpy(), allow_pickle=False)
            facts: dict[str, Any] = {"key": key}
            if rows.short:
                facts["lengths"] = rows.lengths[i].tolist()
            members = {"npy": array.getvalue(), "json": json.dumps(facts).encode()}
            if rows.labels is not None:
                members["cls"] = str(int(rows.labels[i])).encode()
            if rows.text is not None:
                members["txt"] = rows.text[i].encode()
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{int(rows.index[i]):09d}.{ending}")  # no dates, no owners
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


class Shard(Protocol):
    """Random access to the rows of a shard file."""

    def values(self, row: int) -> Tensor:
        """All views of a picture, (V, N) or (V, N, W), in the stored type."""

    def lengths(self, row: int) -> Tensor:
        """Valid tokens of each view, int64, (V,)."""

    def key(self, row: int) -> str:
        """What the picture was called."""

    def label(self, row: int) -> int | None:
        """Its class, None if there are none."""

    def text(self, row: int) -> str | None:
        """Its caption, None if there are none."""


def open_shard(path: Path, layout: Layout, form: str) -> Shard:
    """A shard for reading.

    Raises:
        ShardError: The file is damaged, or holds something else.
    """
    try:
        return SafetensorsShard(path, layout) if form == "safetensors" else TarShard(path, layout)
    except (ValueError, KeyError, TypeError, OSError, tarfile.TarError) as err:
        raise ShardError(f"{path} is damaged or is no shard of tokens: {err}") from err


class SafetensorsShard:
    """A memory-mapped safetensors file; only the rows that are asked for are read from disk."""

    def __init__(self, path: Path, layout: Layout) -> None:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        start = 8 + int.from_bytes(bytes(data[:8]), "little")
        if start > len(data):
            raise ValueError("its header is cut off")
        header = json.loads(bytes(data[8:start]))
        self._columns: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            low, high = entry["data_offsets"]
            flat = data[start + low : start + high].view(_HEADER_NAMES[entry["dtype"]])
            self._columns[name] = flat.reshape(entry["shape"])
        self.layout, self._values = layout, self._columns[layout.kind]
        if self._values.shape[1:3] != (layout.views, layout.tokens):
            raise ValueError(f"rows of {self._values.shape[1:]} where {layout.views} x {layout.tokens} are stored")

    def values(self, row: int) -> Tensor:
        """See `Shard`."""
        found = torch.from_numpy(np.array(self._values[row]))
        return found.view(torch.bfloat16) if self.layout.dtype == "bfloat16" else found

    def lengths(self, row: int) -> Tensor:
        """See `Shard`."""
        if "lengths" not in self._columns:
            return torch.full((self.layout.views,), self.layout.tokens)
        return torch.from_numpy(self._columns["lengths"][row].astype(np.int64))

    def key(self, row: int) -> str:
        """See `Shard`."""
        return self._string("keys", row)

    def label(self, row: int) -> int | None:
        """See `Shard`."""
        return int(self._columns["labels"][row]) if "labels" in self._columns else None

    def text(self, row: int) -> str | None:
        """See `Shard`."""
        return self._string("text", row) if "text" in self._columns else None

    def _string(self, name: str, row: int) -> str:
        ends = self._columns[f"{name}_end"]
        return bytes(self._columns[name][int(ends[row - 1]) if row else 0 : int(ends[row])]).decode()


class TarShard:
    """A WebDataset tar; its members are located once, by their headers."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        found: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, ending = member.name.partition(".")
                found.setdefault(stem, {})[ending] = (member.offset_data, member.size)
        self._places = list(found.values())
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def _member(self, row: int, ending: str) -> bytes | None:
        if ending not in self._places[row]:
            return None
        offset, size = self._places[row][ending]
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise ShardError(f"{self.path} ends early: it was cut off.")
        return data

    def values(self, row: int) -> Tensor:
        """See `Shard`."""
        return torch.from_numpy(np.load(io.BytesIO(self._member(row, "npy") or b""), allow_pickle=False))

    def _facts(self, row: int) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self._member(row, "json") or b"{}")
        return facts

    def lengths(self, row: int) -> Tensor:
        """See `Shard`."""
        return torch.tensor(self._facts(row).get("lengths") or [self.layout.tokens] * self.layout.views)

    def key(self, row: int) -> str:
        """See `Shard`."""
        return str(self._facts(row)["key"])

    def label(self, row: int) -> int | None:
        """See `Shard`."""
        data = self._member(row, "cls")
        return None if data is None else int(data)

    def text(self, row: int) -> str | None:
        """See `Shard`."""
        data = self._member(row, "txt")
        return None if data is None else data.decode()
