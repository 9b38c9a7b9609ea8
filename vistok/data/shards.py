"""WebDataset shards: plain tar files whose members `key.jpg key.txt key.cls` belong together."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vistok.data.base import Sample
from vistok.hub import write_atomic
from vistok.image import EXTENSIONS, decode, find_pictures
from vistok.registry import register

PICTURES = tuple(ending.removeprefix(".") for ending in EXTENSIONS)
FIELDS = ("picture", "text", "label")
INDEX_FORMAT = 1


@register("dataset", "webdataset")
class Shards:
    """Pictures in tar shards, read by random access.

    The members of each shard are located once, by their headers; the index is kept in the cache folder. A sample is
    then one read at a known place, so order, resumption and sharing among processes are those of a folder, and no shard
    is ever read to get to a position.

    Args:
        path: Shards: paths, glob patterns, addresses (http, https), each with brace ranges such as `{0000..0127}`; or a
            list of these. Shards behind addresses are downloaded into the cache folder once.
        captions: Give `key.txt`, or `caption` of `key.json`.
        labels: Give the number in `key.cls`.
        cache: Folder for indices and downloads; `VISTOK_CACHE`/shards, by default ~/.cache/vistok/shards.

    Raises:
        FileNotFoundError: A shard that is not there.
        ValueError: A shard that is not a plain tar file, or shards without pictures.
    """

    def __init__(
        self,
        *,
        path: str | list[str],
        captions: bool = False,
        labels: bool = False,
        cache: Path | None = None,
    ) -> None:
        self.cache = cache or Path(os.environ.get("VISTOK_CACHE", "~/.cache/vistok")).expanduser() / "shards"
        self.captions, self.labels = captions, labels
        sources = [path] if isinstance(path, str) else path
        self.shards = [shard for source in sources for shard in self._locate(source)]
        tables = [load_index(shard, self.cache) for shard in self.shards]
        self.keys: list[str] = [key for table in tables for key in table["keys"]]
        self.shard_of = np.repeat(np.arange(len(tables)), [len(table["keys"]) for table in tables])
        joined = [np.array(table["places"], dtype=np.int64).reshape(-1, 2 * len(FIELDS)) for table in tables]
        self.places = np.concatenate(joined)  # (samples, offset and size of each field; size -1 for none)
        if not self.keys:
            raise ValueError(
                f"There is no picture in the shards {', '.join(sources)} (looked for {', '.join(PICTURES)})."
            )
        self._open: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        """Number of samples with a picture."""
        return len(self.keys)

    def name(self, index: int) -> str:
        """Shard and key."""
        return f"{self.shards[self.shard_of[index]].name}:{self.keys[index]}"

    def read(self, index: int) -> Sample:
        """Read one picture, and its caption and class if asked for.

        Raises:
            PictureError: A damaged picture.
            OSError: A shard that is shorter than its index says.
        """
        picture = decode(self._field(index, "picture") or b"", self.name(index))
        text = _caption(self._field(index, "text") or b"") if self.captions else None
        label = int(self._field(index, "label") or b"-1") if self.labels else None
        return Sample(picture=picture, text=text, label=label)

    def _field(self, index: int, field: str) -> bytes | None:
        column = 2 * FIELDS.index(field)
        offset, size = (int(n) for n in self.places[index, column : column + 2])
        if size < 0:
            return None
        data = os.pread(self._handle(int(self.shard_of[index])), size, offset)
        if len(data) != size:
            raise OSError(f"{self.name(index)} ends early: its shard was cut off after it was indexed.")
        return data

    def _handle(self, shard: int) -> int:
        """An open file per process; `pread` has no position, so threads share it."""
        key = (os.getpid(), shard)
        if key not in self._open:
            self._open[key] = os.open(self.shards[shard], os.O_RDONLY)
        return self._open[key]

    def _locate(self, source: str) -> Iterator[Path]:
        for name in expand(source):
            if name.startswith(("http://", "https://")):
                yield download(name, self.cache)
            else:
                yield from find_pictures(Path(name).expanduser()) if "*" in name else [_existing(name)]


def expand(pattern: str) -> list[str]:
    """Brace ranges written out: `a-{08..11}.tar` gives four names, `{x,y}` two, several braces all combinations."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    low, high, words = found.groups()
    inner = words.split(",") if words else [f"{n:0{len(low)}d}" for n in range(int(low), int(high) + 1)]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [name for word in inner for name in expand(f"{head}{word}{tail}")]


def load_index(shard: Path, cache: Path) -> dict[str, Any]:
    """Keys and places of a shard's samples, from the cache if the shard is the one that was indexed."""
    facts = shard.stat()
    identity = f"{INDEX_FORMAT} {shard.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    file = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"
    if file.is_file():
        try:
            stored: dict[str, Any] = json.loads(file.read_text())
            return stored
        except ValueError:  # cut off by a crash of another program: made anew below
            pass
    table = make_index(shard)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(table).encode())
    return table


def make_index(shard: Path) -> dict[str, Any]:
    """Walk the headers of a tar file.

    Returns:
        `keys`: names of the samples that have a picture, in the shard's order. `places`: for each, offset and size of
        picture, text and label in turn; size -1 where there is none.

    Raises:
        ValueError: Compressed, damaged, or not a tar file.
    """
    rows: dict[str, list[int]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                field = _FIELD_OF.get(ending.lower())
                if member.isfile() and field is not None:
                    key = f"{folder}/{stem}" if folder else stem
                    row = rows.setdefault(key, [0, -1] * len(FIELDS))
                    row[2 * field : 2 * field + 2] = member.offset_data, member.size
    except tarfile.TarError as err:
        raise ValueError(f"{shard} is not a plain tar file ({err}). Unpack compressed shards first.") from err
    kept = {key: row for key, row in rows.items() if row[1] >= 0}
    return {"keys": list(kept), "places": list(kept.values())}


_FIELD_OF = {**dict.fromkeys(PICTURES, 0), "txt": 1, "json": 1, "cls": 2}


def download(address: str, cache: Path) -> Path:
    """Fetch a shard into the cache folder, once.

    Raises:
        FileNotFoundError: The address gives no file, or not all of it.
    """
    target = cache / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{address.rpartition('/')[2]}"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(address) as source, partial.open("wb") as file:
            while block := source.read(2**20):
                file.write(block)
            promised = source.headers.get("Content-Length")
            if promised is not None and file.tell() != int(promised):
                raise OSError(f"the connection ended after {file.tell()} of {promised} bytes; start again")
        os.replace(partial, target)
    except (urllib.error.URLError, OSError) as err:
        partial.unlink(missing_ok=True)
        raise FileNotFoundError(f"The shard {address} could not be fetched: {err}") from err
    return target


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no shard {name!r}. Patterns are like shards/train-{{0000..0127}}.tar.")
    return path


def _caption(data: bytes) -> str:
    text = data.decode("utf-8", errors="replace").strip()
    if text.startswith("{"):
        try:
            return str(json.loads(text).get("caption", ""))
        except ValueError:
            return text
    return text
