"""Published checkpoints: which format a folder is in, and what its keys are called here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Converted = tuple[str, dict[str, Any], dict[str, Tensor]]
Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Format:
    """One project's checkpoint layout.

    Attributes:
        name: What users call it.
        recognises: Whether a configuration and a set of keys are of this layout.
        convert: (configuration, tensors) -> (builder name, its config, tensors under our keys).
    """

    name: str
    recognises: Callable[[Mapping[str, Any], Mapping[str, Tensor]], bool]
    convert: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Converted]


FORMATS: list[Format] = []


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Rename keys by regular expressions, applied in order, each to the result of the one before.

    Raises:
        ValueError: Two keys get the same name.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(f"Two keys of this checkpoint become {new!r}, one of them {key!r}.")
        renamed[new] = value
    return renamed
