"""The `vistok` command: parse, call one function, print. Importing it loads no torch."""

from __future__ import annotations

import os

# Threads that wait for each other spin for a moment, then sleep. Left alone they spin for milliseconds, which makes
# training about twice as slow as soon as another program uses a core. Has to be set before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from vistok.cli.app import main, run

__all__ = ["main", "run"]
