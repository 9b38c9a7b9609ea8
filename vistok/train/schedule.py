"""Learning-rate schedules: pure functions of how far a run is."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "exponential", "constant"]


def lr_at(
    step: int,
    *,
    lr: float,
    steps: int,
    warmup: int = 0,
    final_lr: float = 0.0,
    shape: Shape = "cosine",
    spent: float = 0.0,
) -> float:
    """Learning rate of a step.

    Linear from lr / warmup over `warmup` steps, then from `lr` to `final_lr` along the shape.

    Args:
        step: Step, from 0.
        lr: Peak.
        steps: Steps of the run.
        warmup: Steps of warm-up.
        final_lr: Where the shape ends; not used by `constant`.
        shape: `cosine`, `linear`, `exponential` (by the same factor in every step) or `constant`.
        spent: Share of the run's time limit that is over, in [0, 1]; a run that time will end before its steps are
            done follows it, so that its learning rate still ends at `final_lr`.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if shape == "constant":
        return lr
    through = max((step - warmup) / max(steps - warmup, 1), spent)
    left = 1.0 - min(through, 1.0)
    if shape == "exponential":
        if final_lr <= 0:
            raise ValueError(f"An exponential schedule ends above 0, got final_lr={final_lr}.")
        return float(lr * (final_lr / lr) ** (1 - left))
    if shape == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return final_lr + (lr - final_lr) * left
