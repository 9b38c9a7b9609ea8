"""Files in, files out: what the arguments name, where results go, and no silent overwriting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from vistok.cli import errors

VTOK = (".vtok",)
DIAGRAMS = (".png", ".svg", ".pdf")


@dataclass
class Broken:
    """Files that could not be used; the others are done all the same."""

    reasons: dict[Path, str] = field(default_factory=dict)

    def finish(self) -> None:
        """Name every broken file on stderr; the command then ends with exit code 2.

        Raises:
            typer.Exit: There are some.
        """
        for path, reason in self.reasons.items():
            errors.say(reason if str(path) in reason else f"{path}: {reason}")
        if self.reasons:
            raise typer.Exit(2)


def collect(sources: Sequence[str], find: Callable[[str], list[Path]]) -> dict[Path, Path]:
    """The files that arguments name, each with its place in the output: its path below a folder that was given.

    Args:
        sources: Files, folders and patterns.
        find: Gives the files of one of them.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        root = Path(source) if Path(source).is_dir() else None
        for file in find(source):
            found.setdefault(file, file.relative_to(root) if root else Path(file.name))
    return found


def targets(files: Mapping[Path, Path], out: Path, ending: str, *, overwrite: bool) -> dict[Path, Path]:
    """Where the result of each file goes: `out`, its place, and another ending.

    Raises:
        ValueError: Two files would become the same one.
        FileExistsError: Results exist already and `overwrite` is off.
    """
    places = {file: out / place.with_suffix(ending) for file, place in files.items()}
    owner: dict[Path, Path] = {}
    for file, target in places.items():
        if target in owner:
            raise ValueError(f"{owner[target]} and {file} would both become {target}. Give them in two commands.")
        owner[target] = file
    refuse_existing(list(owner), overwrite=overwrite)
    return places


def refuse_shared(path: Path, what: str, places: Mapping[Path, Path]) -> None:
    """Stop before any work if the result of a file would replace another result.

    Raises:
        ValueError: Names the file.
    """
    for file, target in places.items():
        if target == path:
            raise ValueError(f"{file} and {what} would both become {path}. Rename the file.")


def make_folders(results: Iterable[Path]) -> None:
    """Make the folders of results that are about to be written; not before, so that a refused command leaves none."""
    for folder in {result.parent for result in results}:
        folder.mkdir(parents=True, exist_ok=True)


def refuse_existing(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Stop before any work if a result would replace a file.

    Raises:
        FileExistsError: Names the first such file.
    """
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        exist = f" and {len(there) - 1} more exist" if len(there) > 1 else " exists"
        raise FileExistsError(f"{there[0]}{exist} already. Give --overwrite to replace, or another --out.")


def writable(path: Path | None) -> Path | None:
    """A file that a command writes at its end: refused at its start if that cannot work.

    Raises:
        OSError: It is a folder, or lies where no file can be made.
    """
    if path is None:
        return None
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the name of a file.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise PermissionError(f"{path} cannot be written: {there} {'is read-only' if there.is_dir() else 'is a file'}.")
    return path


def diagram(path: Path | None) -> Path | None:
    """As `writable`, for a diagram.

    Raises:
        ValueError: Another ending.
    """
    if path is not None and path.suffix.lower() not in DIAGRAMS:
        raise ValueError(f"A diagram ends in {', '.join(DIAGRAMS)}, and got {path}.")
    return writable(path)


JsonFile = Annotated[
    Path | None, typer.Option(help="JSON file for the result; replaced if it exists.", callback=writable)
]
Plot = Annotated[Path | None, typer.Option(help="Diagram (PNG, SVG or PDF); replaced if it exists.", callback=diagram)]


def pictures(count: int) -> str:
    """A number of pictures in words."""
    return counted(count, "picture")


def counted(count: int, thing: str) -> str:
    """A number of things in words."""
    return f"{count} {thing}{'s' * (count != 1)}"


def listed(text: str) -> list[str]:
    """The entries of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, option: str) -> list[int]:
    """The entries of a comma-separated option as integers.

    Raises:
        typer.BadParameter: One is none.
    """
    try:
        return [int(word) for word in listed(text)]
    except ValueError as err:
        raise typer.BadParameter(f"{option} takes integers separated by commas, e.g. 16,64, and got {text!r}.") from err
