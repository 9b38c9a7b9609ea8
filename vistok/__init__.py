"""vistok: visual tokenizers, quantizers and token compression under one registry."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vistok.config import create
from vistok.registry import info
from vistok.registry import list_names as list

if TYPE_CHECKING:
    from vistok.plugins.attach import attach
    from vistok.tokenizers.load import load
    from vistok.tokens import Tokens

__version__ = "0.1.0"
__all__ = ["Tokens", "__version__", "attach", "create", "info", "list", "load"]

_LAZY = {"Tokens": "vistok.tokens", "load": "vistok.tokenizers.load", "attach": "vistok.plugins.attach"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vistok' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # type: ignore[valid-type]
    return sorted(__all__)
