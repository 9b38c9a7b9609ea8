"""Plain words about a run that goes wrong, from the figures it logs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Row = Mapping[str, float]
PATIENCE = 5


@dataclass(frozen=True)
class Alarm:
    """One thing that goes wrong in public tokenizer trainings.

    Attributes:
        key: Figure in the log.
        wrong: Whether a value of it is alarming.
        words: What to tell, with `{value}`.
    """

    key: str
    wrong: Callable[[float], bool]
    words: str


ALARMS = (
    Alarm(
        "discriminator/accuracy",
        lambda value: value >= 0.99,
        "The discriminator tells originals from reconstructions {value:.1%} of the time, so its gradient says little. "
        "Lower its learning rate (optim.parts.discriminator.lr), start it later (losses.adversarial.start) or raise "
        "LeCAM (train.step.gan.lecam).",
    ),
    Alarm(
        "discriminator/accuracy",
        lambda value: value <= 0.01,
        "The discriminator is right only {value:.1%} of the time: the generator outruns it. Raise its learning rate "
        "(optim.parts.discriminator.lr) or lower losses.adversarial.weight.",
    ),
    Alarm(
        "quantizer/usage",
        lambda value: value < 0.02,
        "Only {value:.2%} of the code book is in use. Lower optim.lr, use l2_norm codes, or a quantizer without a code "
        "book to learn (fsq, bsq).",
    ),
)


class Watch:
    """Warns once per alarm, when it holds in `PATIENCE` log lines in a row."""

    def __init__(self) -> None:
        self._lines = [0] * len(ALARMS)

    def look(self, row: Row) -> None:
        """Look at one line of the log."""
        for i, alarm in enumerate(ALARMS):
            if alarm.key not in row:
                continue
            wrong = alarm.wrong(row[alarm.key])
            before = self._lines[i]
            told = before >= PATIENCE
            self._lines[i] = before + 1 if wrong or told else 0
            if self._lines[i] == PATIENCE:
                warnings.warn(f"Step {row['step']:.0f}: {alarm.words.format(value=row[alarm.key])}", stacklevel=2)
