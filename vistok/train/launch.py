"""Several processes on a CPU from the command people know."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate.state import PartialState

LAUNCHED = ("WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which a process knows that it is one of several."""


def start_missing_processes(module: str = "vistok") -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N -m vistok ...` was asked for.

    Without MPI, Accelerate starts a single process for this command, whatever N is (its issue 2741). This process then
    replaces itself by `torchrun --nproc_per_node N` with the same arguments. In every other case nothing happens. The
    command line calls it before anything else of `vistok train` and `vistok eval`.

    Args:
        module: Module to run in each process.
    """
    if not is_lonely(os.environ):
        return
    import psutil

    count = processes_asked_for(psutil.Process(os.getppid()).cmdline())
    if count is None:
        warnings.warn(
            "Accelerate was asked for several processes on a CPU and started one. Start them with "
            f"torchrun --nproc_per_node N -m {module} ... instead.",
            stacklevel=2,
        )
    elif count > 1:
        runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", module]
        os.execv(sys.executable, [sys.executable, *runner, *sys.argv[1:]])


def join(patience: timedelta | None = None) -> PartialState:
    """Join the other processes, if there are any: Accelerate's state, with the device and the rank of this one.

    They are left again before the interpreter takes itself apart: the threads of a group that is still there then may
    abort a finished job.

    Args:
        patience: How long a process waits for the others; torch's own time (10 to 30 minutes) if None.
    """
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, **({"timeout": patience} if patience is not None else {}))
    atexit.register(_leave)
    return state


def _leave() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_one_of_several() -> bool:
    """Whether a launcher (accelerate, torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_lonely(environment: Mapping[str, str]) -> bool:
    """Whether this process was started by Accelerate as the only one of several on a CPU."""
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    return on_cpu and "MASTER_PORT" in environment and not any(name in environment for name in LAUNCHED)


def processes_asked_for(command: Sequence[str]) -> int | None:
    """The number behind `--num_processes` or `--num-processes` in a command line, None if it has none."""
    for word, following in zip(command, [*command[1:], ""]):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            number = value or following
            return int(number) if number.isdigit() else None
    return None
