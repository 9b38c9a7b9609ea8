"""Tables and progress in the terminal; plain lines where the output is not one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

WIDE = 10_000  # a pipe has no width: nothing is wrapped or cut there


class Advance(Protocol):
    """Tells a progress bar how much is done."""

    def __call__(self, done: int) -> None:
        """`done` of the total."""


@dataclass(frozen=True)
class Rows:
    """A table before it is drawn; columns without any content are left out.

    Attributes:
        columns: Column names; those that end in `>` are set flush right.
        cells: One row per entry, as text.
    """

    columns: Sequence[str]
    cells: Sequence[Sequence[str]]

    def _filled(self) -> list[int]:
        return [i for i in range(len(self.columns)) if any(row[i] for row in self.cells)]

    def print(self, title: str = "") -> None:
        """Draw it on stdout."""
        tty = console().is_terminal
        table = Table(title=title or None, title_justify="left", box=box.SIMPLE if tty else None, pad_edge=tty)
        for i in self._filled():
            right = self.columns[i].endswith(">")
            table.add_column(self.columns[i].rstrip(">"), justify="right" if right else "left", overflow="fold")
        for row in self.cells:
            table.add_row(*(row[i] for i in self._filled()))
        console().print(table, markup=False, highlight=False)

    def markdown(self) -> str:
        """The same as a Markdown table."""
        chosen = self._filled()
        heads = [self.columns[i] for i in chosen]
        lines = [[h.rstrip(">") for h in heads], ["---:" if h.endswith(">") else "---" for h in heads]]
        lines += [[row[i].replace("|", "\\|") for i in chosen] for row in self.cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def console() -> Console:
    """Standard output, as wide as it has to be where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else WIDE)


class Speed(ProgressColumn):
    """How many a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """`12.3 pictures/s`, nothing before it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else "")


@contextmanager
def progress(what: str, total: int, unit: str = "") -> Iterator[Advance]:
    """A progress bar on stderr while the block runs; nothing where stderr is not a terminal.

    Args:
        what: Name of the work.
        total: How much there is of it.
        unit: What is counted, to show how many a second; empty for no speed.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([Speed(unit)] if unit else []),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
