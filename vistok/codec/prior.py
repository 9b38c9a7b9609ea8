"""Priors over the ids of a picture, and the range coder that turns them into bytes.

A prior gives every symbol of a token sequence a distribution in whole numbers, so that encoder and decoder agree on
every machine. The coder is `constriction`'s range coder (extra `codec`); zero bytes at the end are not stored.
"""

from __future__ import annotations

import binascii
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vistok.hub import LoadError, write_atomic

FILE = "prior.npz"
TOTAL = 1 << 15
"""Sum of the whole numbers of a distribution."""
LARGEST = 1 << 29
"""Bytes that a stored prior may unpack to."""
DAMAGE = (
    *(OSError, EOFError, ValueError, TypeError, IndexError, KeyError, RuntimeError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What a damaged archive makes its readers raise."""
LUCK = 8
"""Bytes by which a code may beat its ideal length for `Prior.lengths` to find it."""


class CodecError(ImportError):
    """The range coder is not installed."""


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as err:
        raise CodecError("Entropy-coded tokens need constriction: pip install 'vistok[codec]'.") from err
    return constriction


def available() -> bool:
    """Whether the range coder is installed."""
    try:
        _constriction()
    except CodecError:
        return False
    return True


class Prior:
    """What is known about ids before any are seen. A subclass implements `rounds`, `symbols`, `ids` and `arrays`.

    Attributes:
        kind: Name in the stored file.
        tokens: Tokens of the longest code it knows.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Prior]]] = {}
    tokens: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Prior.kinds[cls.kind] = cls

    def symbols(self, ids: Tensor) -> np.ndarray:
        """Ids (k,) or (k, G) of one picture -> the symbols that are coded, int32 (S,)."""
        raise NotImplementedError

    def ids(self, symbols: np.ndarray, k: int) -> Tensor:
        """Inverse of `symbols`: int64 (k,) or (k, G)."""
        raise NotImplementedError

    def rounds(self, k: int, seen: np.ndarray) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
        """Which symbols are coded at once, and their distributions in whole numbers (n, V) of sum `TOTAL`.

        A generator over the S symbols of k tokens, each once, token by token, so that the rounds of fewer tokens are
        the first ones; `seen` (S,) holds the symbols of all earlier rounds by the time the next one is asked for.
        """
        raise NotImplementedError

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored; the keyword arguments of the constructor."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.tokens

    @property
    def check(self) -> int:
        """16 bits that name the prior."""
        code = 0
        for name, value in sorted(self.arrays().items()):
            code = binascii.crc_hqx(name.encode() + np.ascontiguousarray(value).tobytes(), code)
        return code

    def encode(self, ids: Tensor) -> bytes:
        """Ids of one picture as bytes.

        Raises:
            CodecError: constriction is not installed.
            ValueError: More tokens than the prior knows.
        """
        coder = _constriction().stream.queue.RangeEncoder()
        for _ in self._coded(coder, ids):
            pass
        return _shortest(coder)

    def lengths(self, ids: Tensor, most: int | None = None) -> list[int]:
        """Bytes of the codes of the first 1, 2, ... tokens; with `most`, of as many as could take at most so many.

        A code is no longer than its ideal length and a few bytes, but a lucky one is shorter, so that lengths need not
        grow with every token. (One that beats its ideal length by more than `LUCK` bytes, one in 2^64, is missed.)

        Raises:
            CodecError: constriction is not installed.
            ValueError: More tokens than the prior knows.
        """
        coder, found, bits = _constriction().stream.queue.RangeEncoder(), [], 0.0
        for done, more in self._coded(coder, ids):
            bits += more
            if done == self.count(len(found) + 1):
                if most is not None and bits > 8 * (most + LUCK):
                    break
                found.append(len(_shortest(coder)))
        return found

    def _coded(self, coder: Any, ids: Tensor) -> Iterator[tuple[int, float]]:
        """Code ids round by round; gives the symbols done and the ideal bits of the last ones."""
        family = _constriction().stream.model.Categorical(perfect=False)
        k, done = self._checked(len(ids)), 0
        symbols = self.symbols(ids)
        for part, counts in self.rounds(k, symbols):
            now = symbols[part]
            coder.encode(now, family, counts.astype(np.float32) / TOTAL)
            done += len(now)
            yield done, float(np.log2(TOTAL / counts[np.arange(len(now)), now]).sum())

    def decode(self, data: bytes, k: int) -> Tensor:
        """Inverse of `encode` for k tokens; bytes that no ids give lead to some other ids.

        Raises:
            CodecError: constriction is not installed.
            ValueError: More tokens than the prior knows.
        """
        stream = _constriction().stream
        words = np.frombuffer(data + bytes(-len(data) % 4 + 8), ">u4").astype(np.uint32)
        coder, family = stream.queue.RangeDecoder(words), stream.model.Categorical(perfect=False)
        seen = np.zeros(self.count(self._checked(k)), np.int32)
        for part, counts in self.rounds(k, seen):
            seen[part] = coder.decode(family, counts.astype(np.float32) / TOTAL)
        return self.ids(seen, k)

    def bits(self, ids: Tensor) -> np.ndarray:
        """Ideal code length of every token, in bits, (k,): what the coder comes to within a few bits."""
        symbols, k = self.symbols(ids), len(ids)
        found = np.zeros(len(symbols))
        for part, counts in self.rounds(k, symbols):
            found[part] = np.log2(TOTAL / counts[np.arange(len(counts)), symbols[part]])
        return found.reshape(k, self.count(1)).sum(1)

    def count(self, k: int) -> int:
        """Symbols of k tokens."""
        raise NotImplementedError

    def _checked(self, k: int) -> int:
        if k > self.tokens:
            raise ValueError(f"The prior knows codes of up to {self.tokens} tokens, these have {k}.")
        return k

    def save(self, folder: str | Path) -> Path:
        """Write `prior.npz` beside a tokenizer's weights."""
        data = io.BytesIO()
        arrays: dict[str, Any] = self.arrays()
        np.savez_compressed(data, kind=np.array(self.kind), **arrays)
        write_atomic(Path(folder) / FILE, data.getvalue())
        return Path(folder) / FILE


def _shortest(coder: Any) -> bytes:
    """The code of a range encoder, big-endian, with as few bytes as any number in its final interval has.

    The coder ends on a whole word; every number in [lower, lower + range) behind the words already out says the same.
    """
    words = coder.get_compressed().astype(">u4").tobytes()
    done, (lower, size) = coder.pos()
    head, tail = words[: 4 * done], int.from_bytes(words[4 * done :].ljust(8, b"\0")[:8], "big")
    if lower <= tail < lower + size:  # not if the interval reaches beyond 2^64 and a carry is open
        for count in range(9):
            step = 1 << 8 * (8 - count)
            number = -(-lower // step) * step
            if number < min(lower + size, 1 << 64):
                return (head + number.to_bytes(8, "big")).rstrip(b"\0")
    return words.rstrip(b"\0")


def whole(weights: np.ndarray) -> np.ndarray:
    """Positive weights (n, V) as whole numbers of sum `TOTAL`, none below 1, int64."""
    count = weights.shape[-1]
    if count > TOTAL // 2:
        raise ValueError(f"A prior has at most {TOTAL // 2} symbols per position, got {count}.")
    share = weights / weights.sum(-1, keepdims=True)
    found = 1 + np.floor(share * (TOTAL - count)).astype(np.int64)
    rows, best = np.arange(len(found)), found.argmax(-1)
    found[rows, best] += TOTAL - found.sum(-1)
    return found


class PositionPrior(Prior):
    """A distribution for every position and group, whatever stands elsewhere: fits any tokenizer.

    Args:
        counts: How often each id was seen, (K, G, V); smoothed by one half each.
        vocab: Ids of each group, G entries; columns beyond a group's size are ignored.
    """

    kind = "position"

    def __init__(self, *, counts: np.ndarray, vocab: np.ndarray) -> None:
        self.counts, self.vocab, self.tokens = counts, vocab.astype(np.int64), len(counts)
        outside = np.arange(counts.shape[-1]) >= self.vocab[:, None]  # (G, V)
        self.table = whole(np.where(outside, 0.0, counts + 0.5).reshape(-1, counts.shape[-1]))

    def arrays(self) -> dict[str, np.ndarray]:
        """See `Prior.arrays`."""
        return {"counts": self.counts, "vocab": self.vocab}

    def count(self, k: int) -> int:
        """See `Prior.count`."""
        return k * len(self.vocab)

    def symbols(self, ids: Tensor) -> np.ndarray:
        """See `Prior.symbols`."""
        return ids.cpu().numpy().astype(np.int32).reshape(-1)

    def ids(self, symbols: np.ndarray, k: int) -> Tensor:
        """See `Prior.ids`."""
        shape = (k,) if len(self.vocab) == 1 else (k, len(self.vocab))
        return torch.from_numpy(symbols.astype(np.int64)).reshape(shape)

    def rounds(self, k: int, seen: np.ndarray) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
        """See `Prior.rounds`."""
        step = self.count(1)
        for start in range(0, self.count(k), step):
            yield slice(start, start + step), self.table[start : start + step]

    @classmethod
    def fit(cls, ids: Tensor, vocab: Sequence[int]) -> PositionPrior:
        """From the ids of many pictures, (B, K) or (B, K, G)."""
        rows = (ids.unsqueeze(-1) if ids.ndim == 2 else ids).cpu().numpy()  # (B, K, G)
        counts = np.zeros((*rows.shape[1:], max(vocab)), np.uint32)
        place = np.indices(rows.shape[1:])
        for row in rows:
            np.add.at(counts, (*place, row), 1)
        return cls(counts=counts, vocab=np.array(vocab))


def _vocab(tokenizer: Any) -> tuple[int, ...]:
    vocab: tuple[int, ...] = tokenizer.quantizer.vocab_sizes
    if not vocab or max(vocab) > TOTAL // 2:
        has = f"up to {max(vocab)} ids" if vocab else "continuous latents"
        raise ValueError(
            f"{tokenizer.registry_name} has {has}, and a prior is a table of at most {TOTAL // 2} ids per position."
        )
    return vocab


def require(tokenizer: Any) -> None:
    """Refuse, before any work, what `fit` or the coder would refuse.

    Raises:
        CodecError: constriction is not installed.
        ValueError: Continuous latents, or more ids than a table can hold.
    """
    _constriction()
    _vocab(tokenizer)


def fit(tokenizer: Any, ids: Tensor) -> Prior:
    """The prior a tokenizer has a use for, from the ids of many pictures (B, K[, G]).

    A tokenizer may make its own (`fit_prior`); all others get one distribution per position.

    Raises:
        ValueError: Continuous latents, or more ids than a table can hold.
    """
    vocab = _vocab(tokenizer)
    own = getattr(tokenizer, "fit_prior", None)
    return own(ids) if own is not None else PositionPrior.fit(ids, vocab)


def read(folder: str | Path) -> Prior | None:
    """The prior beside a tokenizer's weights, None if there is none.

    Raises:
        LoadError: A damaged file or an unknown kind.
    """
    import vistok.codec.planes  # noqa: F401  (registers its kind)

    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > LARGEST:
                raise LoadError(f"{path} unpacks to more than {LARGEST >> 20} MB, which no prior does. Delete it.")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return Prior.kinds[str(arrays.pop("kind"))](**arrays)
    except LoadError:
        raise
    except DAMAGE as err:
        raise LoadError(f"{path} is no prior of vistok: {err}. Delete it to do without entropy coding.") from err
