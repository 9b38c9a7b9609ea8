"""Which errors are the user's, and how they are said: one line. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

PACKAGE = Path(__file__).resolve().parents[1]
DELIBERATE = (ValueError, TypeError, KeyError, IndexError, RuntimeError, ImportError)


def is_users(err: BaseException) -> bool:
    """Whether an error tells the user something: the system refused a file, or vistok raised it on purpose.

    On purpose means that the innermost frame is a `raise` statement of ours; a ValueError from inside torch, or a
    KeyError from a dictionary, is a bug.
    """
    return isinstance(err, OSError) or (isinstance(err, DELIBERATE) and _raised_by_us(err))


def _raised_by_us(err: BaseException) -> bool:
    trace = err.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    line = linecache.getline(file, trace.tb_lineno).strip()
    return Path(file).resolve().is_relative_to(PACKAGE) and line.startswith("raise ")


def message(err: BaseException) -> str:
    """The error in one line."""
    if isinstance(err, OSError) and err.strerror:
        text = f"{err.filename}: {err.strerror}" if err.filename else err.strerror
    else:
        text = str(err.args[0]) if err.args else type(err).__name__
    return " ".join(text.split())


def say(text: str) -> None:
    """An error line on stderr."""
    typer.secho(f"Error: {text}", err=True, fg="red")


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show warnings as single lines on stderr, without the source line that raised them."""

    def show(text: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        typer.secho(f"Warning: {' '.join(str(text).split())}", err=True, fg="yellow")

    if sys.warnoptions:  # somebody who runs python -W wants to see them as they are
        yield
        return
    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield
