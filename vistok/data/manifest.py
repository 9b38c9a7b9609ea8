"""What lies in a folder of token shards: whose tokens, of what, made how, and the checksum of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from vistok.assets import sha256
from vistok.config import plain
from vistok.data.token_shards import ENDINGS, Layout
from vistok.hub import write_atomic

MANIFEST = "manifest.json"
FORMAT = "vistok-ids"
VERSION = 1
PACKAGES = ("vistok", "torch", "numpy", "pillow")
NOT_COMPARED = ("source",)
"""Parts of the identity that may differ between a run and its continuation: the same thing by another name."""


class ManifestError(ValueError):
    """A folder of tokens that is unfinished, damaged, or made in another way than asked for."""


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """One shard.

    Attributes:
        number: Its place in the order of the data set.
        file: Name in the folder; empty for a shard of which no picture could be read.
        samples: Pictures in it.
        bytes: Size of the file.
        sha256: Hash of the file.
        skipped: Picture that could not be read -> why.
        layout: Of its tokens; None without samples.
    """

    number: int
    file: str
    samples: int
    bytes: int = 0
    sha256: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)
    layout: Layout | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShardFacts:
        """What `to_dict` gave, read from JSON."""
        layout = values["layout"]
        return cls(**{**values, "layout": None if layout is None else Layout.from_dict(layout)})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "skipped": dict(self.skipped), "layout": self.layout and self.layout.to_dict()}

    def problem(self, folder: Path, *, contents: bool) -> str:
        """What is wrong with the file, empty if nothing is; `contents` compares its hash as well."""
        if not self.file:
            return ""
        path = folder / self.file
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != self.bytes:
            return f"{path} has {path.stat().st_size} bytes instead of {self.bytes}"
        if contents and sha256(path) != self.sha256:
            return f"{path} has another checksum than the manifest says"
        return ""


def shard_name(number: int, form: str) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}{ENDINGS[form]}"


SIDECARS = ".shard-*.json"


def sidecar(folder: Path, number: int) -> Path:
    """File that says that a shard is complete, until the manifest of all of them is written."""
    return folder / f".shard-{number:05d}.json"


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's manifest.

    Raises:
        ManifestError: There is none, or it is not a manifest that this vistok reads.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ManifestError(f"{folder} has no {MANIFEST}: it is no folder of tokens. vistok tokenize makes them.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ManifestError(f"{path} is not valid JSON: {err}") from err
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ManifestError(f"{path} is not the manifest of a folder of tokens.")
    if found.get("version") != VERSION:
        raise ManifestError(f"{path} is of version {found.get('version')}; this vistok reads version {VERSION}.")
    return found


def shards_of(found: Mapping[str, Any], folder: Path) -> list[ShardFacts]:
    """The shards of a finished folder, checked for presence and size.

    Raises:
        ManifestError: The job is not finished, or a shard is missing or has another size.
    """
    if not found["complete"]:
        total = -(-found["identity"]["data"]["samples"] // found["identity"]["shards"]["samples"])
        done = len(list(folder.glob(SIDECARS)))
        raise ManifestError(
            f"{folder} is not finished: {done} of {total} shards are there. The same vistok tokenize command goes on."
        )
    shards = [ShardFacts.from_dict(entry) for entry in found["shards"]]
    refuse([shard.problem(folder, contents=False) for shard in shards])
    return shards


def refuse(problems: Iterable[str]) -> None:
    """Stop if there are problems with shards.

    Raises:
        ManifestError: Names the first.
    """
    named = [problem for problem in problems if problem]
    if named:
        others = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
        raise ManifestError(
            f"{named[0]}{others}. The same vistok tokenize command makes missing and damaged shards anew."
        )


def differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    """Dotted keys in which two identities differ, with both values."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        keys = [k for k in dict.fromkeys([*mine, *theirs]) if k not in NOT_COMPARED]
        return [d for k in keys for d in differences(mine.get(k), theirs.get(k), f"{path}.{k}" if path else str(k))]
    return [] if mine == theirs else [f"{path} was {_short(theirs)}, is {_short(mine)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def begin(folder: Path, identity: Mapping[str, Any]) -> set[int]:
    """Open a folder for a job: write the first manifest, or check that the one there is of the same job.

    Returns:
        The numbers of the shards that are complete; their files have been compared with their checksums.

    Raises:
        ManifestError: The folder holds the tokens of another tokenizer, data set or setting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).is_file():
        write(folder, identity, [], complete=False)
    there, mine = read(folder)["identity"], json.loads(json.dumps(plain(identity)))  # as it comes back from a file
    changed = differences(mine, there)
    if changed:
        raise ManifestError(
            f"{folder} holds tokens of another job: {'; '.join(changed[:4])}. Choose another --out, or repeat the "
            "command that made them."
        )
    for file in folder.glob(".*"):  # what a kill left half written
        if file.name.startswith((f".{MANIFEST}.", ".shard-", "..shard-")) and not file.match(SIDECARS):
            file.unlink()
    found = noted(folder)
    return {number for number, shard in found.items() if not shard.problem(folder, contents=True)}


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def note(folder: Path, shard: ShardFacts) -> None:
    """Say that a shard is complete."""
    write_atomic(sidecar(folder, shard.number), json.dumps(shard.to_dict(), ensure_ascii=False).encode())


def noted(folder: Path) -> dict[int, ShardFacts]:
    """Every shard that was complete once, by number."""
    entries: list[Mapping[str, Any]] = list(read(folder)["shards"])
    for file in sorted(folder.glob(SIDECARS)):
        entries.append(json.loads(file.read_text(encoding="utf-8")))
    facts = [ShardFacts.from_dict(entry) for entry in entries]
    return {shard.number: shard for shard in facts}


def write(
    folder: Path, identity: Mapping[str, Any], shards: Iterable[ShardFacts], *, complete: bool, batch: int = 0
) -> None:
    """Write the manifest; a complete one takes the place of the shards' own notes.

    Args:
        folder: Where.
        identity: What decides the content of the shards.
        shards: What is known of each.
        complete: Whether all are there.
        batch: Views that were encoded at once.
    """
    listed = sorted(shards, key=lambda shard: shard.number)
    layout = next((shard.layout for shard in listed if shard.layout is not None), None)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "complete": complete,
        "samples": sum(shard.samples for shard in listed),
        "skipped": {name: why for shard in listed for name, why in shard.skipped.items()},
        "layout": layout and layout.to_dict(),
        "identity": plain(identity),
        "made_with": {**{name: metadata.version(name) for name in PACKAGES}, "batch": batch},
        "shards": [shard.to_dict() for shard in listed],
    }
    write_atomic(folder / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False).encode())
    for shard in listed if complete else ():
        sidecar(folder, shard.number).unlink(missing_ok=True)
