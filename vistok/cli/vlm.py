"""`vistok bench vlm`: which benchmark, and what is printed and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from vistok.cli import files

PLOT = Path("vlm_sweep.png")


class Task(str, Enum):
    """What a benchmark measures."""

    speed = "speed"
    scenes = "scenes"


class Clock(str, Enum):
    """How time is counted."""

    wall = "wall"
    process = "process"


class Dtype(str, Enum):
    """Precision of a model's weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def run(
    model: Path | None,
    *,
    methods: Sequence[str],
    keep: Sequence[str],
    scenes: bool,
    sweep: bool,
    image_tokens: int,
    questions: int,
    rounds: int,
    threads: int | None,
    clock: Any,
    dtype: str,
    plot: Path | None,
) -> dict[str, Any]:
    """Measure, print the table, draw the plot; the result for a JSON file.

    Raises:
        ValueError: Scenes without a model, a directory without one, or a budget that is no number.
    """
    from vistok.cli.show import Rows, progress
    from vistok.evaluate import bench_scenes, bench_vlm
    from vistok.evaluate.vlm import settings_of

    if scenes and model is None:
        raise ValueError(
            "--task scenes needs --model, a directory of a trained one (recipes/vlm/make_host.py makes one)."
        )
    budgets: Any = [share(text) for text in keep]
    given: dict[str, Any] = {"rounds": rounds, "threads": threads, "clock": clock}
    if sweep or budgets:
        given["keep"] = budgets or bench_vlm.SWEEP
    if methods:
        given["methods"] = methods
    if model is not None:
        given["dtype"] = dtype
    if scenes:
        budgets = given.get("keep", bench_scenes.BUDGETS)
        settings = settings_of(given.get("methods", bench_scenes.DEFAULT), budgets)
        with progress("settings", len(settings) + 1) as advance:
            answers = bench_scenes.run(model, questions=questions, progress=advance, **given)
        Rows(*bench_scenes.table(answers)).print()
        typer.echo(bench_scenes.caption(answers))
    else:
        with progress("rounds", rounds + 1) as advance:
            speed = bench_vlm.run(model, image_tokens=image_tokens, progress=advance, **given)
        typer.echo(bench_vlm.table(speed))
    path = plot or (PLOT if sweep else None)
    if path is not None:
        files.make_folders([path])
        if scenes:
            bench_scenes.plot(answers, path)
        else:
            bench_vlm.plot(speed, path)
        typer.echo(f"Wrote {path}")
    return answers.to_dict() if scenes else speed.to_dict()


def share(text: str) -> float | int:
    """A budget: a whole number of tokens, or a share.

    Raises:
        ValueError: Neither.
    """
    try:
        found = int(text) if text.isdigit() and int(text) > 1 else float(text)
    except ValueError:
        found = 0
    if (isinstance(found, float) and not 0 < found <= 1) or not found:
        raise ValueError(f"--keep takes shares in (0, 1] or numbers of tokens, got {text!r}.")
    return found
