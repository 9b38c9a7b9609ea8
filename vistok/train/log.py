"""The run's log: `metrics.jsonl` always, trackers by name, one progress line for people."""

from __future__ import annotations

import importlib.util
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vistok.hub import write_atomic
from vistok.train.steps.base import Part

if TYPE_CHECKING:
    from accelerate import Accelerator

METRICS = "metrics.jsonl"


EXTRAS = {"tensorboard": "'vistok[track]'"}
"""What to install for a tracker, where it is not the package of its name."""


def available_trackers(names: tuple[str, ...]) -> list[str]:
    """The trackers whose package is installed; one warning for each that is not."""
    found = []
    for name in names:
        if importlib.util.find_spec(name) is None:
            line = f"pip install {EXTRAS.get(name, name)}"
            warnings.warn(f"{name} is not installed, so there is only {METRICS}. {line} adds it.", stacklevel=2)
        else:
            found.append(name)
    return found


class Means:
    """Means of named scalars since the last `take`, kept on their device so that nothing waits for them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Enter scalars."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over steps and processes; starts anew. Every process has to call it."""
        names = sorted(self._sums)
        if not names:
            return {}
        means = torch.stack([self._sums[n] / self._counts[n] for n in names])
        self._sums, self._counts = {}, {}
        if accelerator.num_processes > 1:
            means = accelerator.reduce(means, "mean")
        return dict(zip(names, means.tolist()))


def gradient_norms(part: Part, probe: nn.Parameter | None, accelerator: Accelerator) -> dict[str, Tensor]:
    """Norm of each weighted loss's gradient at the last layer, over all processes: which loss pulls how hard.

    Losses that do not reach the layer (a quantizer's) have none.
    """
    if probe is None or not probe.requires_grad:
        return {}
    norms = {}
    for name, weight in part.weights.items():
        term = part.terms[name]
        if term.requires_grad:
            (gradient,) = torch.autograd.grad(term, probe, retain_graph=True, allow_unused=True)
            if gradient is not None:
                mean: Tensor = accelerator.reduce(gradient.detach().float(), "mean")
                norms[f"grad_norm_of/{name}"] = weight * mean.norm()
    return norms


class Log:
    """Writes the log of one run.

    Args:
        accelerator: Tells which process writes, and holds the trackers.
        out: Folder of the run.
        steps: Steps of the whole run.
        start: Step the run begins or continues at; later lines of an earlier attempt are dropped.
        seconds: Seconds of training before `start`.
        images_per_step: Pictures per step over all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        out: Path,
        *,
        steps: int,
        start: int,
        seconds: float,
        images_per_step: int,
    ) -> None:
        from rich.console import Console

        self.accelerator, self.path, self.steps = accelerator, out / METRICS, steps
        self.images_per_step = images_per_step
        self.means = Means()
        self.writes = accelerator.is_main_process
        self.console = Console(quiet=not self.writes)
        self._bar: Any = None
        self._task: Any = None
        self._mark = (start, seconds, 0.0)
        self._said = (time.perf_counter(), start)
        if self.writes:
            self._file = self._continue(start)
            self._open_bar(start)

    def _continue(self, start: int) -> Any:
        rows = read(self.path)
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= start]
        write_atomic(self.path, "".join(kept if start else []).encode())
        return self.path.open("a")

    def _open_bar(self, start: int) -> None:
        from rich import progress

        if not self.console.is_terminal:
            return
        columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("{task.description}"))
        self._bar = progress.Progress(*columns, progress.TimeRemainingColumn(), console=self.console)
        self._task = self._bar.add_task("", total=self.steps, completed=start)
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, seconds: float, waited: float, facts: Mapping[str, float]) -> dict[str, float]:
        """Write one line: means since the last one, speed, share of waiting for data, and `facts`.

        Args:
            step: Steps finished.
            seconds: Seconds of training so far.
            waited: Seconds of them spent waiting for data, in this process.
            facts: Further figures.
        """
        spent = max(seconds - self._mark[1], 1e-9)
        speed = (step - self._mark[0]) * self.images_per_step / spent
        row = {"step": step, **self.means.take(self.accelerator), "images_per_s": speed, "seconds": seconds}
        row |= {"data_wait": (waited - self._mark[2]) / spent, **facts}
        self._mark = (step, seconds, waited)
        row = {k: v if isinstance(v, int) else float(f"{v:.7g}") for k, v in row.items()}
        self.record(row)
        self._say(row)
        return row

    def record(self, row: Mapping[str, Any]) -> None:
        """Append one row to the file and the trackers."""
        if self.writes:
            self._file.write(json.dumps(dict(row)) + "\n")
            self._file.flush()
        values = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
        self.accelerator.log(values, step=int(row["step"]))

    def _say(self, row: Mapping[str, float]) -> None:
        text = f"loss {row.get('loss', float('nan')):.4g}, {row['images_per_s']:.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            return
        now, step = time.perf_counter(), int(row["step"])
        if now - self._said[0] > 10 or step >= self.steps or self._said[1] == 0:
            left = (self.steps - step) * self.images_per_step / max(row["images_per_s"], 1e-9)
            self.console.print(f"step {step}/{self.steps}  {text}, {clock(left)} left", highlight=False)
            self._said = (now, step)

    def say(self, text: str) -> None:
        """One line for people, from the first process only."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Close the bar and the file."""
        if self._bar is not None:
            self._bar.stop()
        if self.writes:
            self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def history(path: Path) -> dict[str, list[float]]:
    """The columns of a `metrics.jsonl`, for plots; a row without a column's value has NaN there."""
    rows = read(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [float(row.get(name, float("nan"))) for row in rows] for name in names}


def clock(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    total = round(seconds)
    for big, small, per, scale in (("d", "h", 24, 3600), ("h", "min", 60, 60), ("min", "s", 60, 1)):
        value = total // scale
        if value >= per:
            return f"{value // per} {big} {value % per} {small}"
    return f"{total} s"
