"""What a figure depends on, collected so that somebody else can get the same one.

`collect` gives one JSON-ready mapping: data (name, number of pictures, hash), preprocessing, metric definitions and
weight hashes, model hash, versions, git commit, command. `flatten` turns it into the rows of a table.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vistok.assets import sha256
from vistok.config import plain
from vistok.evaluate.metric import Metric

PACKAGES = ("vistok", "torch", "torchvision", "pillow", "numpy", "timm", "diffusers", "open_clip_torch", "accelerate")


def data_facts(
    name: str, files: Sequence[str | Path], *, root: str | Path | None = None, contents: bool = True
) -> dict[str, Any]:
    """Name, size and hash of an evaluation set.

    The hash is over the sorted file names (relative to `root`), each with the SHA-256 of its content, so it depends on
    neither the folder's place nor the order of reading.

    Args:
        name: What people call it.
        files: The files that were used.
        root: Folder the names are relative to; None for bare file names.
        contents: Hash contents; off, sizes stand in for them (sets of many gigabytes).

    Returns:
        `name`, `pictures`, `sha256`, `hashed`.
    """
    lines = []
    for file in map(Path, files):
        relative = file.resolve().relative_to(Path(root).resolve()).as_posix() if root is not None else file.name
        lines.append(f"{relative}\0{sha256(file) if contents else file.stat().st_size}\n")
    digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    hashed = "file names and contents" if contents else "file names and sizes"
    return {"name": name, "pictures": len(lines), "sha256": digest, "hashed": hashed}


def model_facts(model: nn.Module, name: str) -> dict[str, Any]:
    """Name, class, size and hash of a model's weights.

    The hash is over key, shape, type and bytes of every tensor of the state dict, in the order of the keys.

    Args:
        model: The model as it was evaluated.
        name: Preset, checkpoint or hub id it was loaded from.

    Returns:
        `name`, `class`, `parameters`, `sha256`, and `config` if the model has one.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    facts = {
        "name": name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": digest.hexdigest(),
    }
    config = getattr(model, "config", None)
    return {**facts, "config": plain(config)} if isinstance(config, Mapping) else facts


def preprocess_facts(preprocess: Any) -> dict[str, Any]:
    """The fields of a `Preprocess`, and whether its resize filters before it samples (Pillow's do, except nearest)."""
    facts = dict(plain(preprocess))
    return {**facts, "antialias": facts.get("resample") != "nearest"}


def versions() -> dict[str, str]:
    """Installed versions of what can change a figure; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout vistok runs from, with `-dirty` if tracked files differ; None for an installed copy."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", "-C", str(package), *arguments), capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # a virtual environment inside somebody's checkout
        return None
    commit = git("rev-parse", "HEAD")
    return commit and commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", ".") else "")


def command() -> str:
    """The command line of this process as one would type it."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    if path.name == "__main__.py":
        words = ["python", "-m", path.parent.name]
    elif path.suffix == ".py":
        words = ["python", program]
    else:
        words = ["python"] if program in ("", "-", "-c") else [path.name]
    return shlex.join([*words, *arguments])


def collect(
    *,
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    preprocess: Any,
    metrics: Mapping[str, Metric],
    command_line: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything the figures of one evaluation depend on.

    Args:
        data: From `data_facts`.
        model: From `model_facts`.
        preprocess: The `Preprocess` that was applied.
        metrics: Registered name -> the metric object that measured.
        command_line: Command that repeats the evaluation; None for that of this process.
        settings: Anything else that matters: precision, number of tokens, batch size, seed.

    Returns:
        Sections `data model preprocess metrics settings versions device command git`, ready for JSON.
    """
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "data": plain(data),
        "model": plain(model),
        "preprocess": preprocess_facts(preprocess),
        "metrics": {name: metric.protocol() for name, metric in metrics.items()},
        "settings": plain(dict(settings or {})),
        "versions": versions(),
        "device": ", ".join(names) or f"CPU, {torch.get_num_threads()} threads",
        "command": command() if command_line is None else command_line,
        "git": git_commit(),
    }


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and their values as text, for a table. None becomes `none`, floats keep six digits."""
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping):
            rows += flatten(inner, f"{name}.")
        elif isinstance(inner, float):
            rows.append((name, f"{inner:.6g}"))
        elif isinstance(inner, (list, tuple)):
            rows.append((name, ", ".join(str(i) for i in inner)))
        else:
            rows.append((name, "none" if inner is None else str(inner)))
    return rows
