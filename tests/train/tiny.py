"""The smallest recipe that has everything: a tokenizer with a drawing quantizer, on the bundled photographs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vistok.config import merge
from vistok.registry import register
from vistok.train import checkpoint
from vistok.train.recipe import Recipe, from_dict
from vistok.train.steps.reconstruct import Reconstruct

SIZE = {"width": 32, "depth": 1, "heads": 2}
BASE: dict[str, Any] = {
    "model": {
        "name": "titok",
        "image_size": 32,
        "patch_size": 8,
        "num_tokens": 8,
        "encoder": SIZE,
        "decoder": SIZE,
        "quantizer": {"name": "vq_stochastic", "codebook_size": 32, "dim": 4},
    },
    "data": {"name": "photos", "split": "train"},
    "losses": {"mse": {"weight": 1.0}},
    "optim": {"name": "adamw", "lr": 1e-3, "warmup": 2},
    "train": {"steps": 6, "global_batch": 4, "log_every": 2, "save_every": 3, "trackers": []},
}


@register("step", "paused")
class Paused(Reconstruct):
    """Reconstruction that sleeps in every step, so that there is time to be killed."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds

    def run(self, batch, step, generator):
        time.sleep(self.seconds)
        yield from super().run(batch, step, generator)


def values(out: Path, over: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The recipe as a dictionary, with changes."""
    return merge(merge(BASE, {"train": {"out": str(out)}}), over or {})


def recipe(out: Path, over: Mapping[str, Any] | None = None) -> Recipe:
    """The checked recipe, with changes."""
    return from_dict(values(out, over))


def weights(out: Path, step: int, name: str = "model") -> dict[str, Tensor]:
    """Weights in the checkpoint of a step."""
    return load_file(out / checkpoint.FOLDER / f"step_{step:09d}" / f"{name}.safetensors")


def start(recipe_file: Path, *overrides: str, rank: int = 0, world: int = 1, port: int = 0) -> subprocess.Popen[str]:
    """Train in a process of its own, as one of `world`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if world > 1:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.train.tiny", str(recipe_file), *overrides]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> None:
    """Train the recipe given on the command line."""
    from vistok.train.loop import train
    from vistok.train.recipe import load

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background may have switched it off
    train(load(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
