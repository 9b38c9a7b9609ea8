"""The `vistok` command: parse, call one function, print. Importing it loads no torch."""

from __future__ import annotations

from vistok.cli.app import main, run

__all__ = ["main", "run"]
