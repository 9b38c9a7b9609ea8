"""`config.json` + `model.safetensors`: save, load strictly, push; local folders and the hub alike."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistok.config import create, plain
from vistok.registry import nearest

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = "vistok"
HUB_PREFIX = "hf-hub:"
FETCHED = ("*.json", "*.safetensors", "prior.npz")
"""What is fetched of a hub repository; where that brings no weights, the next ones too."""
FETCHED_OF_PROJECTS = ("*.yaml", "*.yml", "*.pt", "*.pth", "*.ckpt", "*.bin")
KEPT = ("tokenizer", "compressor")
"""Kinds whose modules are kept in folders."""


class LoadError(ValueError):
    """Weights or a configuration that do not fit; the message lists what does not."""


Converted = tuple[str, dict[str, Any], dict[str, Tensor]]
Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Format:
    """One project's checkpoint layout.

    Attributes:
        name: What users call it.
        recognises: Whether a configuration and a set of keys are of this layout.
        convert: (configuration, tensors) -> (builder name, its config, tensors under our keys).
        kind: Registry kind of what it becomes.
    """

    name: str
    recognises: Callable[[Mapping[str, Any], Mapping[str, Tensor]], bool]
    convert: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Converted]
    kind: str = "tokenizer"


FORMATS: list[Format] = []
"""Every layout that is known, entered by the modules of the kinds in `KEPT`."""


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


class Saveable:
    """Mixin for registered modules: remembers the constructor's arguments, saves and loads itself.

    Attributes:
        config: Keyword arguments it was built with, defaults included.
    """

    registry_kind: ClassVar[str]
    registry_name: ClassVar[str]
    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    def extra_config(self) -> dict[str, Any]:
        """Facts stored beside the configuration (a tokenizer's preprocessing and model id)."""
        return {}

    def restore_extra(self, saved: Mapping[str, Any]) -> None:
        """Take up what `extra_config` stored; `saved` is the whole content of `config.json`."""

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` into a folder, each file atomically.

        Returns:
            The folder.
        """
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}  # type: ignore[attr-defined]
        head = {"format": FORMAT, "kind": self.registry_kind, "name": self.registry_name, "config": plain(self.config)}
        write_atomic(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
        write_atomic(folder / CONFIG, json.dumps(head | self.extra_config(), indent=2).encode())
        return folder

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Any:
        """Load what `save_pretrained` wrote, from a folder or `hf-hub:org/name`.

        Raises:
            LoadError: Another format or class, or weights that do not fit.
        """
        config, tensors = read_folder(source)
        if config.get("format") != FORMAT:
            raise LoadError(f"{source} is not in vistok's format. Use vistok.load, which knows official checkpoints.")
        module = build_saved(config, tensors, str(source))
        if not isinstance(module, cls):
            raise LoadError(f"{source} holds {config['name']!r}, a {type(module).__name__}, not a {cls.__name__}.")
        return module

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Upload the module to a hub repository `org/name` (needs a login); returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo, folder_path=folder))


def _recording(init: Any) -> Any:
    """Wrap a constructor so that the outermost one stores its bound arguments as `config`."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_recorded" not in self.__dict__:
            bound = inspect.signature(init).bind(self, *args, **kwargs)
            bound.apply_defaults()
            object.__setattr__(self, "_recorded", plain(dict(list(bound.arguments.items())[1:])))
        init(self, *args, **kwargs)
        object.__setattr__(self, "config", self.__dict__["_recorded"])

    return wrapped


def build_saved(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Any:
    """Build a module from the content of a folder in vistok's format and load its tensors strictly.

    Raises:
        LoadError: The configuration names nothing that is registered here, or the weights do not fit.
    """
    kind, name, arguments = (config.get(key) for key in ("kind", "name", "config"))
    if not isinstance(kind, str) or not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise LoadError(f"{source}/{CONFIG} does not describe a vistok module: it needs kind, name and config.")
    module = create_saved(kind, name, arguments, f"{source}/{CONFIG}")
    if not isinstance(module, Saveable) or not isinstance(module, nn.Module):
        raise LoadError(f"{source}/{CONFIG} names the {kind} {name!r}, which is not kept in folders.")
    load_strictly(module, tensors, source)
    module.restore_extra(config)
    return module


def create_saved(kind: str, name: str, arguments: Mapping[str, Any], source: str) -> Any:
    """`create` for a configuration that somebody else wrote: whatever is wrong with it is a `LoadError`."""
    try:
        return create(kind, name, **arguments)
    except (KeyError, ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as err:
        # ours first; the rest is what torch says to negative or enormous sizes
        why = " ".join(str(err.args[0] if err.args else type(err).__name__).split())
        raise LoadError(f"{source} does not fit this vistok: {why}") from err


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; every key and shape must fit. Half-precision files become the module's own precision.

    Raises:
        LoadError: Lists missing and unknown keys and wrong shapes.
    """
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or extra or wrong:
        shapes = [f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}" for k in wrong]
        found = (("missing", missing), ("not known", extra), ("wrong shape", shapes))
        said = "; ".join(f"{what} {_some(keys)}" for what, keys in found if keys)
        raise LoadError(f"{source} does not fit {type(module).__name__}: {said}.")
    module.load_state_dict(dict(tensors), strict=True)


def _some(keys: list[str], limit: int = 6) -> str:
    return f"{len(keys)} ({', '.join(keys[:limit])}{', ...' if len(keys) > limit else ''})"


def read_folder(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and all safetensors of a folder or of `hf-hub:org/name`. Nothing in them is executed.

    Raises:
        LoadError: No such folder, a missing or damaged file.
    """
    folder = locate(source)
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise LoadError(f"{folder} has no {CONFIG}. A checkpoint folder holds {CONFIG} and {WEIGHTS}.")
    try:
        config = json.loads(config_file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise LoadError(f"{config_file} is not valid JSON: {err}") from err
    if not isinstance(config, dict):
        raise LoadError(f"{config_file} does not hold a JSON object.")
    return config, read_tensors(folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files (sharded or not)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LoadError(f"{folder} has no safetensors file. A checkpoint folder holds {CONFIG} and {WEIGHTS}.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as err:
            raise LoadError(f"{file} is damaged or not a safetensors file: {err}") from err
    return tensors


def read_header(file: str | Path) -> dict[str, Any]:
    """The configuration in a safetensors file's header, where a project keeps it there as Python or JSON literals.

    Only literals are read, nothing is executed. `{}` for other files and for headers that hold none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
        found = {name: ast.literal_eval(text) for name, text in header.items() if text.lstrip().startswith("{")}
    except (SafetensorError, OSError, ValueError, SyntaxError, MemoryError, RecursionError):
        return {}
    return {"config": found} if found else {}


def fetch_file(repo: str, filename: str) -> Path:
    """One file of a hub repository, from the local cache if it is there.

    Raises:
        LoadError: It is in no cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        raise LoadError(
            f"{filename} of {repo!r} could not be fetched from the hub and is not in its cache: {err}"
        ) from err


def locate(source: str | Path) -> Path:
    """The local folder behind a path or `hf-hub:org/name` (downloaded into the Hugging Face cache).

    Raises:
        LoadError: Neither; says how to write both.
    """
    text = str(source)
    if text.startswith(HUB_PREFIX):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        repo = text.removeprefix(HUB_PREFIX)
        try:
            folder = Path(snapshot_download(repo, allow_patterns=list(FETCHED)))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(repo, allow_patterns=[*FETCHED, *FETCHED_OF_PROJECTS]))
            return folder
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
            raise LoadError(f"{repo!r} could not be fetched from the hub and is not in its cache: {err}") from err
    path = Path(source)
    if path.is_dir():
        return path
    parent = path.parent if path.parent.is_dir() else Path()
    near = nearest(path.name, (p.name for p in parent.iterdir() if p.is_dir()), listing=False)
    raise LoadError(f"There is no folder {text!r}. {near + ' ' if near else ''}For the hub write hf-hub:org/name.")


def model_id(tensors: Mapping[str, Tensor]) -> str:
    """First 4 bytes, as 8 hex digits, of a sha256 over tensors: sorted names, shapes and float32 bytes."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that a crash leaves either the old or the new content, never half of it."""
    try:
        _write_and_replace(Path(path), data)
    except OSError as err:
        if err.errno:  # the system names a temporary file, or none where the disk is full
            err.filename = str(path)
        raise


def _write_and_replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(p.numel() for p in module.parameters())


def on_meta(kind: str, name: str, **config: Any) -> nn.Module:
    """Build a component without memory, to look at its keys and sizes."""
    with torch.device("meta"):
        module: nn.Module = create(kind, name, **config)
    return module
