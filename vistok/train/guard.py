"""What stops a run in time: steps that are not finite, and the user's Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vistok.train.sharding import local


class Diverged(RuntimeError):
    """Too many non-finite steps in a row; the message names what was not finite."""


class Guard:
    """Skips steps whose loss or gradient is not finite, counts them, and ends the run after `limit` in a row.

    Args:
        limit: Bad steps in a row that end the run.

    Attributes:
        total: Steps skipped so far.
        row: Steps skipped in a row up to now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.row = 0
        self._bad = False
        self._buffers: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def begin(self, trained: Mapping[str, nn.Module]) -> None:
        """A step begins: remember buffers (running statistics, moving code books), which a bad step would spoil."""
        self._bad = False
        self._buffers = {name: [(b, b.clone()) for b in module.buffers()] for name, module in trained.items()}

    def refuse(self, part: str, cause: str, step: int) -> None:
        """A part of the step is bad: put its buffers back and say so (once per bad streak)."""
        for buffer, before in self._buffers[part]:
            buffer.copy_(before)
        if not self.row and not self._bad:
            warnings.warn(f"Step {step} is skipped: {cause}.", stacklevel=2)
        self._bad = True
        self.cause = cause

    def end(self, step: int) -> bool:
        """A step is over; whether it was good.

        Raises:
            Diverged: It was the last of `limit` bad ones in a row.
        """
        self.row = self.row + 1 if self._bad else 0
        self.total += self._bad
        if self.row >= self.limit:
            raise Diverged(
                f"{self.row} steps in a row up to step {step} were not finite: {self.cause}. Checkpoints "
                f"written before are good. Lower optim.lr or optim.clip, lengthen optim.warmup, or set "
                f"train.precision=fp32."
            )
        return not self._bad


def find_cause(losses: Mapping[str, Tensor], module: nn.Module) -> str:
    """Which losses, or else which gradients, are not finite, in words."""
    found = {name: float(value.detach()) for name, value in losses.items()}
    bad = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
    if bad:
        return "loss " + ", ".join(bad)
    named = [(n, p.grad) for n, p in module.named_parameters() if p.grad is not None]
    grads = [name for name, grad in named if not torch.isfinite(local(grad)).all()]
    if grads:
        return (
            f"the losses are finite, the gradients of {len(grads)} of {len(named)} tensors are not (first: {grads[0]})"
        )
    return "not finite on another process"


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the step; a second Ctrl-C kills at once.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        name: Name of the signal that came, empty if none did.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.name = self.name or signal.Signals(number).name
