"""The `--probe` of `vistok eval`: what features know about classes."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vistok.cli import files

if TYPE_CHECKING:
    from vistok.evaluate.probe import ProbeResult
    from vistok.tokenizers.base import Tokenizer

FILE = "probe.json"
SHOWN = (1, 5, 10, 20)
"""Numbers of neighbours that are printed; the file has all from 1 to 20."""


class Pool(str, Enum):
    """How positions become one row of features."""

    mean = "mean"
    flat = "flat"


def run(
    tokenizer: Tokenizer,
    folder: Path,
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
    from vistok.evaluate.probe import labelled_folder, probe
    from vistok.hub import write_atomic

    train, test = labelled_folder(folder)
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
