"""Where official projects put weights and configuration: a folder or a file, with YAML, JSON or plain assignments."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok import hub
from vistok.unpickle import read_tensors

CONFIGS = (".yaml", ".yml", ".json", ".py")
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def read_config(path: str | Path) -> dict[str, Any]:
    """A configuration as plain values: YAML, JSON, or a Python file of assignments of literals. Nothing is executed.

    Of a Python file, assignments at the top whose right side is a literal count; everything else is passed over.

    Raises:
        LoadError: No such file, or not a mapping in one of these languages.
    """
    path = Path(path)
    if not path.is_file():
        raise hub.LoadError(f"There is no configuration {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8")
        found = {".py": _assignments, ".json": json.loads}.get(path.suffix, _yaml)(text)
    except (ValueError, SyntaxError, RecursionError) as err:
        reason = " ".join(str(err).split())
        raise hub.LoadError(f"{path} cannot be read as a configuration: {reason}") from err
    if not isinstance(found, dict):
        raise hub.LoadError(f"{path} holds no mapping at its top.")
    return found


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ValueError(str(err)) from err


def _assignments(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in ast.parse(text).body:
        if not (isinstance(line, ast.Assign) and all(isinstance(target, ast.Name) for target in line.targets)):
            continue
        try:
            value = ast.literal_eval(line.value)
        except ValueError:  # a call or a name: not data
            continue
        found |= {target.id: value for target in line.targets if isinstance(target, ast.Name)}
    return found


def read_checkpoint(source: str | Path, config: str | Path | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration (empty if there is none) and tensors of a weight file, or of a folder that holds one.

    Args:
        source: A weight file, or a folder with one (several safetensors files are the shards of one).
        config: Configuration file; if None the one in the safetensors header, the file of the same name beside the
            weights, or the only one in the folder.

    Raises:
        LoadError: No weights, several of which to choose, or a configuration that cannot be read.
        UnreadableError: Weights that cannot be read.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    weights = _weights(folder) if source.is_dir() else [source]
    tensors: dict[str, Tensor] = {}
    for file in weights:
        tensors |= read_tensors(file)
    if config is not None:
        return read_config(config), tensors
    if header := hub.read_header(weights[0]):
        return header, tensors
    found = _config(folder, weights[0], alone=source.is_dir())
    return (read_config(found) if found else {}), tensors


def _weights(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS and p.is_file())
    shards = [p for p in found if p.suffix == ".safetensors"]
    if shards:
        return shards
    if len(found) != 1:
        what = f"several weight files ({_names(found)}). Give the one you mean" if found else "no weight file"
        raise hub.LoadError(f"{folder} holds {what} ({', '.join(WEIGHTS)}).")
    return found


def _config(folder: Path, weights: Path, *, alone: bool) -> Path | None:
    """The configuration beside a weight file; `alone`: whether its folder was given, so that any name will do."""
    beside = [p for ending in CONFIGS if (p := weights.with_suffix(ending)).is_file()]
    found = beside or (sorted(p for p in folder.iterdir() if p.suffix in CONFIGS and p.is_file()) if alone else [])
    if len(found) > 1:
        named = [p for p in found if p.stem == "config"]
        if len(named) != 1:
            raise hub.LoadError(f"{folder} holds several configurations ({_names(found)}). Say which one with config=.")
        found = named
    return found[0] if found else None


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(p.name for p in paths[:6]) + (", ..." if len(paths) > 6 else "")
