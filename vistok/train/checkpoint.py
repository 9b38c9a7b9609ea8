"""Checkpoints: everything a run needs to go on, written atomically, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.config import create, write_yaml
from vistok.hub import load_strictly

STATE = "state.json"
RECIPE = "recipe.yaml"
FOLDER = "checkpoints"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which file and why."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything of a run at one step.

    Randomness needs no entry beyond the seed in the recipe: order, crops and noise are functions of (seed, step,
    process), so the position of the data and of every generator is the step itself.

    Attributes:
        step: Steps finished.
        modules: State dict of every part and, under `ema`, the averages.
        optimizers: State dict of every optimiser.
        extra: Tensors of the step object.
        facts: Numbers and strings: seconds, EMA updates, versions, commit, data fingerprint.
        recipe: The resolved recipe.
    """

    step: int
    modules: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, Mapping[str, Any]]
    extra: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any]


def save(out: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint: into a temporary folder, flushed to the disk, then renamed; then delete the oldest.

    Returns:
        Its folder, `out/checkpoints/step_...`.

    Raises:
        CheckpointError: The disk is full or not writable; what was there before is untouched.
    """
    from safetensors import SafetensorError

    parent = out / FOLDER
    final = parent / f"step_{snapshot.step:09d}"
    partial = parent / f".{final.name}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(".*.partial"):
            shutil.rmtree(stale)
        partial.mkdir()
        _write(partial, snapshot)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(parent)
    except (OSError, SafetensorError, RuntimeError) as err:  # safetensors and torch.save have their own
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {snapshot.step} could not be written to {parent}: {_cause(err)}. "
            f"Earlier checkpoints are untouched."
        ) from err
    for old in folders(out)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _cause(err: Exception) -> str:
    """Why a file could not be written: the system's words, which torch.save buries below its own."""
    found: BaseException | None = err
    while found is not None and not (isinstance(found, OSError) and found.strerror):
        found = found.__cause__ or found.__context__
    return str(err).strip().rstrip(".") if found is None else str(found.strerror)


def _write(folder: Path, snapshot: Snapshot) -> None:
    from safetensors.torch import save_file

    for name, tensors in [*snapshot.modules.items(), ("extra", snapshot.extra)]:
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(own, folder / f"{name}.safetensors")
    for name, state in snapshot.optimizers.items():
        with (folder / f"optimizer_{name}.pt").open("wb") as file:
            torch.save(state, file)  # into a file of Python's, whose errors say what is wrong
    write_yaml(snapshot.recipe, folder / RECIPE)
    files = {file.name: _facts_of(file) for file in sorted(folder.iterdir())}
    state = {"step": snapshot.step, **snapshot.facts, "files": files}
    (folder / STATE).write_text(json.dumps(state, indent=2))
    for file in folder.iterdir():
        _flush(file)
    _flush(folder)


def _facts_of(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folders(out: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; half-written ones are not among them."""
    return sorted((out / FOLDER).glob("step_*"))


def load(folder: Path) -> Snapshot:
    """Read one checkpoint and check every file of it against the hashes it was written with.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = _read_state(folder)
    try:
        tensors = {f.stem: load_file(f) for f in sorted(folder.glob("*.safetensors"))}
        pickles = sorted(folder.glob("optimizer_*.pt"))
        optimizers = {f.stem.removeprefix("optimizer_"): torch.load(f, weights_only=True) for f in pickles}
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError) as err:
        raise CheckpointError(f"The checkpoint {folder} cannot be read: {err}") from err
    step, extra = state.pop("step"), tensors.pop("extra")
    recipe = read_recipe(folder)
    return Snapshot(step=step, modules=tensors, optimizers=optimizers, extra=extra, facts=state, recipe=recipe)


def _read_state(folder: Path) -> dict[str, Any]:
    """`state.json`, once every file it lists was found whole."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        for name, facts in state.pop("files").items():
            if not (folder / name).is_file():
                raise CheckpointError(f"The checkpoint {folder} is incomplete: {name} is missing.")
            if _facts_of(folder / name) != facts:
                raise CheckpointError(f"The checkpoint {folder} is damaged: {name} is not what was written.")
    except (OSError, ValueError, KeyError) as err:
        raise CheckpointError(f"The checkpoint {folder} is damaged: {STATE} cannot be read ({err}).") from err
    return state


def read_recipe(folder: Path) -> dict[str, Any]:
    """The resolved recipe a checkpoint was written with."""
    from vistok.config import read_yaml

    return read_yaml(folder / RECIPE)


def newest(out: Path) -> Snapshot | None:
    """The newest checkpoint that is whole; a damaged one is named in a warning and the one before is taken.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    found = folders(out)
    causes = []
    for folder in reversed(found):
        try:
            snapshot = load(folder)
        except CheckpointError as err:
            causes.append(str(err))
            continue
        for cause in causes:
            warnings.warn(f"{cause} {folder.name} is taken instead.", stacklevel=2)
        return snapshot
    if causes:
        raise CheckpointError(f"No checkpoint of {out} can be read. {' '.join(causes)}")
    return None


def tokenizer_of(snapshot: Snapshot, source: Path) -> Any:
    """The tokenizer of a checkpoint, with its averaged weights where the run keeps any; on the CPU, in eval mode.

    Raises:
        LoadError: The weights are not those of a whole tokenizer; `source` is named.
    """
    model: Any = create("tokenizer", **snapshot.recipe["model"])
    load_strictly(model, {**snapshot.modules["model"], **snapshot.modules.get("ema", {})}, str(source))
    return model.eval()
