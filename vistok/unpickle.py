"""Reading weight files that somebody else wrote, without executing anything of them.

`read_tensors` gives the table of tensors in a file, `read` everything in it. Whatever is not a tensor or a plain value
becomes an `Inert` placeholder.
"""

from __future__ import annotations

import pickle
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.registry import nearest

WEIGHT_TABLES = ("state_dict", "ema", "model", "module")
"""Entries of training checkpoints that hold the weights, the averaged ones first (Lightning, GigaTok, DeepSpeed)."""


class UnreadableError(ValueError):
    """A weight file that cannot be read, or holds something else than weights."""


class Inert:
    """Stands where a foreign pickle had a global that is not a tensor: keeps nothing, does nothing.

    Attributes:
        origin: `module.name` of the global.
    """

    origin = "?"

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """Swallow whatever the pickle passes to the constructor."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Inert:
        """What an inert function returns."""
        return self

    def append(self, item: Any) -> None:
        """Swallow an item (pickles of list subclasses)."""

    def extend(self, items: Any) -> None:
        """Swallow items."""

    def add(self, item: Any) -> None:
        """Swallow an item (pickles of set subclasses)."""

    def __repr__(self) -> str:
        return f"<inert {self.origin}>"


def _drop_state(build: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor without the Python attributes somebody had hung on it; `build` is admitted itself, or inert."""
    return build(*arguments)


def _drop_parameter_state(data: Any, requires_grad: Any, hooks: Any, _state: Any) -> Any:
    return torch._utils._rebuild_parameter(data, requires_grad, hooks)


# Functions that build tensors from storages, and containers without behaviour. `torch.storage._load_from_bytes` is
# left out on purpose: it unpickles once more, without restrictions.
_ALLOWED: Mapping[tuple[str, str], Any] = types.MappingProxyType(
    {
        ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_tensor_v3"): torch._utils._rebuild_tensor_v3,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _drop_parameter_state,
        ("torch._tensor", "_rebuild_from_type_v2"): _drop_state,
        ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
    }
)


def _inert_class(module: str, name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"origin": f"{module}.{name}"})


class _InertUnpickler(pickle.Unpickler):
    """Resolves tensors and plain containers; every other global becomes an `Inert` subclass."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch":
            found = vars(torch).get(name)
            if isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage")):
                return found
        return _inert_class(module, name)


def _inert_load(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


def unpickle(path: str | Path) -> Any:
    """Read a `.pt`, `.pth`, `.ckpt` or `.bin` file of `torch.save` without executing anything of it.

    Tensors, parameters, dtypes, dictionaries, lists, tuples, sets and plain values come out as they are, on the
    CPU; every other global (a config class, a callback, a function) is an `Inert` instance or class.

    Raises:
        UnreadableError: Not a file of `torch.save`, a TorchScript program, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UnreadableError(f"There is no file {path}.")
    shim = types.SimpleNamespace(Unpickler=_InertUnpickler, load=_inert_load, __name__="vistok.assets")
    try:
        _refuse_programs(path)
        return torch.load(path, map_location="cpu", pickle_module=shim, weights_only=False)
    except UnreadableError:
        raise
    except Exception as err:  # damaged archives and pickles make their readers raise nearly anything
        raise UnreadableError(f"{path} cannot be read as a checkpoint of torch.save: {_reason(err)}") from err


def _reason(err: Exception) -> str:
    return str(err) or type(err).__name__


def _refuse_programs(path: Path) -> None:
    if _is_zip(path):
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
        if any(n.endswith("constants.pkl") or "/code/" in n for n in names):
            raise UnreadableError(
                f"{path} is a TorchScript program, not a table of weights. Save its state_dict instead."
            )
    elif tarfile.is_tarfile(path):
        raise UnreadableError(f"{path} is a tar archive (torch before 0.1.10). Save it again with a newer torch.")


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it ends like one, and is damaged there
        return True


def read_numpy_pickle(path: str | Path) -> dict[str, Any]:
    """Read a pickle of nested dictionaries of NumPy arrays, as JAX projects write them.

    Exactly three globals are admitted, the ones an array consists of; any other one is refused.

    Raises:
        UnreadableError: The pickle wants something else, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            return _NumpyUnpickler(file).load()
    except Exception as err:  # as above
        raise UnreadableError(f"{path} cannot be read as a table of NumPy arrays: {_reason(err)}") from err


class _NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # the module that holds it moved between NumPy 1 and 2
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of an array")


def read(path: str | Path) -> Any:
    """Read a weight file by its kind: safetensors, NumPy pickle (`read_numpy_pickle`) or torch.save (`unpickle`).

    Raises:
        UnreadableError: The file cannot be read.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_numpy_pickle(path) if _is_numpy_pickle(path) else unpickle(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as err:
        raise UnreadableError(f"{path} cannot be read as safetensors: {err}") from err


def _is_numpy_pickle(path: Path) -> bool:
    """A pickle with NumPy arrays near its start; `torch.save` writes a zip archive or, of old, a magic number first."""
    if not path.is_file() or _is_zip(path):
        return False
    with open(path, "rb") as file:
        head = file.read(4096)
    return b"numpy" in head and b"torch" not in head


def read_tensors(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The table of tensors in a weight file.

    Args:
        path: A safetensors file or one of `torch.save`.
        key: Dotted entry that holds the table, e.g. `state_dict` or `ema.model`. None takes the only one there is;
            of several the first of `WEIGHT_TABLES`.

    Raises:
        UnreadableError: Unreadable, no such entry, no tensors, or several tables and no `key`.
    """
    tables = dict(_tables(read(path)))
    if key is None:
        key = next((name for name in WEIGHT_TABLES if name in tables), None)
    if key is None and len(tables) > 1:
        raise UnreadableError(f"{path} holds several tables of tensors: {', '.join(tables)}. Say which one with key=.")
    key = next(iter(tables), "") if key is None else key
    if key not in tables:
        named = f" under {key!r}. {nearest(key, tables)}" if key else "."
        raise UnreadableError(f"{path} holds no table of tensors{named}")
    return tables[key]


def _tables(value: Any, at: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(value, Mapping):
        return
    own = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
    if own:
        yield at, own
    for name, inner in value.items():
        yield from _tables(inner, f"{at}.{name}" if at else str(name))
