"""What a recipe will cost here, from a few measured steps that leave nothing behind."""

from __future__ import annotations

import dataclasses
import resource
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from vistok.train import build
from vistok.train.log import Means, clock
from vistok.train.loop import optimise, set_learning_rates
from vistok.train.recipe import Recipe

WARM = 3


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a run.

    Attributes:
        steps: Optimiser steps of the recipe.
        images: Pictures seen, with repeats.
        passes: How often each picture is seen.
        seconds_per_step: Median over the measured steps.
        hours: Of all steps (evaluations and checkpoints come on top), within the recipe's time limit.
        images_per_s: Over all processes.
        memory_gb: Peak of one process: of the device's memory, or of the process on a CPU.
        checkpoint_gb: One checkpoint.
        data_wait: Share of the time spent waiting for data.
        processes: Number of processes it was measured with.
        measured: Steps measured.
    """

    steps: int
    images: int
    passes: float
    seconds_per_step: float
    hours: float
    images_per_s: float
    memory_gb: float
    checkpoint_gb: float
    data_wait: float
    processes: int
    measured: int

    def __str__(self) -> str:
        """A few lines for people."""
        return "\n".join(
            (
                f"steps          {self.steps} ({self.seconds_per_step:.3g} s each, from {self.measured} measured)",
                f"images         {self.images} ({self.passes:.3g} passes over the data)",
                f"time           {clock(3600 * self.hours)} at {self.images_per_s:.3g} images/s, "
                f"{self.processes} process{'es' * (self.processes > 1)}",
                f"memory         {self.memory_gb:.2f} GB per process at its peak",
                f"checkpoint     {self.checkpoint_gb:.2f} GB each",
                f"data wait      {self.data_wait:.1%} of the time",
            )
        )


def estimate(recipe: Recipe, *, measured: int = 20) -> Estimate:
    """Run a few steps of a recipe, new and in a temporary folder, and reckon what all of them take.

    Args:
        recipe: From `vistok.train.recipe.load`.
        measured: Steps to measure, after three that warm up.

    Raises:
        ConfigError: The recipe does not fit the model or the data.
    """
    with tempfile.TemporaryDirectory() as folder:
        train = dataclasses.replace(recipe.train, out=Path(folder), trackers=(), max_seconds=None)
        run = build.start(dataclasses.replace(recipe, train=train))
        try:
            times, waited = _measure(run, measured)
        finally:
            run.accelerator.end_training()
        return _reckon(recipe, run, times, waited)


def _measure(run: build.Run, measured: int) -> tuple[list[float], float]:
    """Seconds of each measured step, and the share of them spent waiting for data."""
    times, waited, means = [], 0.0, Means()
    with closing(run.loader.steps(0, WARM + measured)) as steps:
        for _ in range(WARM + measured):
            waited = run.loader.waited if run.step == WARM else waited
            began = time.perf_counter()
            set_learning_rates(run)
            optimise(run, next(steps), means)
            run.step += 1
            times.append(time.perf_counter() - began)
    times = times[WARM:]
    return times, (run.loader.waited - waited) / sum(times)


def _reckon(recipe: Recipe, run: build.Run, times: list[float], waited: float) -> Estimate:
    config = recipe.train
    per_step = sorted(times)[len(times) // 2]
    seconds = min(per_step * config.steps, config.max_seconds or float("inf"))
    images = config.steps * config.global_batch
    tensors = [t for snapshot in _tensors(run) for t in snapshot]
    return Estimate(
        steps=config.steps,
        images=images,
        passes=images / len(run.loader.reader.dataset),
        seconds_per_step=per_step,
        hours=seconds / 3600,
        images_per_s=config.global_batch / per_step,
        memory_gb=_peak(run.accelerator.device),
        checkpoint_gb=sum(t.numel() * t.element_size() for t in tensors) / 1e9,
        data_wait=waited,
        processes=run.accelerator.num_processes,
        measured=len(times),
    )


def _tensors(run: build.Run) -> list[list[torch.Tensor]]:
    """Every tensor a checkpoint would hold."""
    found = build.snapshot(run)
    states = [s for optimizer in found.optimizers.values() for s in optimizer["state"].values()]
    moments = [[v for v in state.values() if isinstance(v, torch.Tensor)] for state in states]
    return [*(list(module.values()) for module in found.modules.values()), *moments]


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
