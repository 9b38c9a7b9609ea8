"""The `--probe` of `vistok eval`: what features know about classes."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vistok.cli import files

if TYPE_CHECKING:
    from vistok.evaluate.probe import LabelledFiles, ProbeResult
    from vistok.tokenizers.base import Tokenizer

FILE = "probe.json"
SHOWN = (1, 5, 10, 20)
"""Numbers of neighbours that are printed; the file has all from 1 to 20."""


class Pool(str, Enum):
    """How positions become one row of features."""

    mean = "mean"
    flat = "flat"


def opened(tokenizer: Tokenizer, folder: Path, point: str) -> tuple[LabelledFiles, LabelledFiles]:
    """What to learn from and what to test on; refused before any work where the folder or the point does not fit."""
    from vistok.evaluate.probe import check_point, labelled_folder

    check_point(tokenizer, point)
    return labelled_folder(folder)


def run(
    tokenizer: Tokenizer,
    sets: tuple[LabelledFiles, LabelledFiles],
    out: Path,
    *,
    point: str,
    pool: Pool,
    num_tokens: int | None,
    batch: int,
    name: str,
) -> dict[Path, str]:
    """Probe a labelled folder, write `probe.json`, print a table; pictures that could not be used, with the reason."""
    from vistok.cli.show import progress
    from vistok.evaluate.probe import probe
    from vistok.hub import write_atomic

    train, test = sets
    with progress("probe", len(train) + len(test)) as advance:
        result = probe(
            tokenizer,
            train,
            test,
            point=point,
            pool=pool.value,
            num_tokens=num_tokens if point == "codes" else None,
            batch=batch,
            name=name,
            progress=advance,
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / FILE, json.dumps(result.to_dict(), indent=2).encode())
    _print(result)
    typer.echo(f"Wrote {out / FILE}")
    return {Path(path): why for path, why in result.skipped.items()}


def _print(result: ProbeResult) -> None:
    from vistok.cli.show import Rows

    shown = [("linear probe", result.linear, "linear")]
    shown += [(f"{k} nearest", share, f"knn_{k}") for k, share in result.knn.items() if k in SHOWN]
    cells = [(title, f"{share:.4g}", "{:.4g} to {:.4g}".format(*result.intervals[key])) for title, share, key in shown]
    cells.append(("most frequent class", f"{result.chance:.4g}", ""))
    head = f"{files.pictures(result.pictures['test'])}, {result.classes} classes"
    Rows((head, "right>", "95 % interval"), cells).print()
