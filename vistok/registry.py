"""The one registry: every name a user can say, and what it builds.

Each kind has two tables. *Builders* are classes with a keyword-only, typed signature (their config schema).
*Presets* are named configurations of a builder, with or without published weights. The tables fill themselves:
the first look-up of a kind imports every module of its folder and every installed `vistok.plugins` entry point.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        "tokenizer": "vistok.tokenizers",
        "quantizer": "vistok.quantizers",
        "generator": "vistok.generators",
        "loss": "vistok.losses",
        "step": "vistok.train.steps",
        "method": "vistok.compress.methods",
        "compressor": "vistok.compress.compressors",
        "family": "vistok.plugins.families",
        "host": "vistok.plugins.hosts",
        "dataset": "vistok.data",
        "metric": "vistok.evaluate",
    }
)
KINDS: tuple[str, ...] = tuple(FOLDERS)
ENTRY_POINTS = "vistok.plugins"

Builder = Callable[..., Any]
B = TypeVar("B", bound=Builder)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where published weights live and what is known about them.

    Attributes:
        hub: Hub repository id, `org/name`; empty where the weights are on no hub and `source` says where.
        filename: File inside the repository.
        sha256: Hash of that file in hex, None where it was never seen by us.
        model_id: First 4 bytes (8 hex digits) of the hash over the encoder-to-ids tensors, None until computed.
        licence_code: Licence of the official code.
        licence_weights: Licence and stated restrictions of the weights.
        trained_on: Data set.
        figures: Published figures, metric name to value.
        source: Where the figures stand.
        protocol: Protocol they were measured by, see `vistok list --protocols`; empty where it was not published.
        options: What the command that measures them needs besides, e.g. ` --tokens 32`.
    """

    hub: str = ""
    shipped: str = ""
    filename: str = "model.safetensors"
    sha256: str | None = None
    model_id: str | None = None
    licence_code: str
    licence_weights: str
    trained_on: str
    figures: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    protocol: str = ""
    options: str = ""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named configuration of one builder.

    Attributes:
        kind: Registry kind.
        name: Registered name, `family_size_tokens.tag` where weights exist.
        builder: Name of the builder it configures.
        config: Keyword arguments of the builder.
        weights: Published weights, None where there are none.
    """

    kind: str
    name: str
    builder: str
    config: Mapping[str, Any]
    weights: Weights | None = None


@dataclass(frozen=True, kw_only=True)
class Info:
    """What the registry knows about one name.

    Attributes:
        kind: Registry kind.
        name: The name asked for.
        builder: Builder that makes it.
        summary: First line of the builder's docstring.
        config: Configuration (of a preset; empty for a builder).
        weights: Published weights, if any.
    """

    kind: str
    name: str
    builder: str
    summary: str
    config: Mapping[str, Any]
    weights: Weights | None


def nearest(name: object, known: Iterable[object], *, listing: bool = True) -> str:
    """One sentence that helps after a miss.

    Args:
        name: What was asked for.
        known: What there is.
        listing: List what there is if nothing comes close (else the sentence is then empty).
    """
    known = sorted({str(k) for k in known})
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    if not listing:
        return ""
    if not known:
        return "There are none."
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return f"Known: {shown}."


class Registry:
    """The two tables of one kind."""

    def __init__(self, kind: str, folder: str) -> None:
        self.kind = kind
        self.folder = folder
        self.builders: dict[str, Builder] = {}
        self.presets: dict[str, Preset] = {}
        self.broken: dict[str, str] = {}
        self._filled = False
        self._lock = threading.RLock()

    def add_builder(self, name: str, builder: Builder) -> None:
        """Enter a builder; a taken name is an error that names its owner."""
        self._refuse_taken(name, getattr(builder, "__module__", "?"))
        self.builders[name] = builder

    def add_preset(self, preset: Preset) -> None:
        """Enter a preset; a taken name is an error that names its owner."""
        self._refuse_taken(preset.name, f"a preset of {preset.builder!r}")
        self.presets[preset.name] = preset

    def _refuse_taken(self, name: str, newcomer: str) -> None:
        if name in self.builders:
            owner = f"{self.builders[name].__module__}.{self.builders[name].__qualname__}"
        elif name in self.presets:
            owner = f"a preset of {self.presets[name].builder!r}"
        else:
            return
        raise ValueError(
            f"{self.kind} {name!r} (from {newcomer}) is already registered by {owner}. Choose another name."
        )

    def fill(self) -> None:
        """Import the kind's folder and the third-party plug-ins, once; report what fails to import by name."""
        with self._lock:  # a second thread waits for full tables; the same thread may look up while it imports
            if self._filled:
                return
            self._filled = True
            self._import_below(self.folder)
            _load_entry_points()

    def _import_below(self, package: str) -> None:
        """Import every module of a package and of the packages inside it, in alphabetical order."""
        if not _exists(package) or not self._import(package):
            return
        for found in sorted(pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda m: m.name):
            name = f"{package}.{found.name}"
            if found.ispkg:
                self._import_below(name)
            else:
                self._import(name)

    def _import(self, module: str) -> bool:
        try:
            importlib.import_module(module)
        except Exception as err:  # one broken module must not take the others down: it is reported by name
            self.broken[module] = f"{type(err).__name__}: {err}"
            warnings.warn(f"vistok could not import {module}, so what it registers is missing: {err}", stacklevel=4)
            return False
        return True

    def resolve(self, name: str) -> tuple[str, Builder, Preset | None]:
        """Builder name, builder and preset (None for a plain builder) behind a name.

        Raises:
            KeyError: Unknown name; the message lists the nearest ones.
        """
        self.fill()
        preset = self.presets.get(name)
        builder = preset.builder if preset else name
        if builder in self.builders:
            return builder, self.builders[builder], preset
        broken = self.broken | broken_plugins
        lost = f" Not importable: {'; '.join(f'{m} ({e})' for m, e in broken.items())}." if broken else ""
        if preset:
            raise KeyError(f"The {self.kind} preset {name!r} needs the builder {builder!r}, which is missing.{lost}")
        raise KeyError(f"No {self.kind} named {name!r}. {nearest(name, self.names())}{lost}")

    def names(self, pattern: str = "*", *, pretrained: bool = False) -> list[str]:
        """Sorted names that match a shell pattern; with `pretrained` only presets that have weights."""
        self.fill()
        found = {n for n, p in self.presets.items() if p.weights is not None or not pretrained}
        if not pretrained:
            found |= set(self.builders)
        return sorted(fnmatch.filter(found, pattern))


_REGISTRIES: dict[str, Registry] = {kind: Registry(kind, folder) for kind, folder in FOLDERS.items()}
broken_plugins: dict[str, str] = {}
"""Third-party plug-ins that could not be loaded: entry-point name -> error."""
_entry_points_loaded = False


def _exists(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is not there either
        return False


def _load_entry_points() -> None:
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except (Exception, SystemExit) as err:  # somebody else's package: reported by name, the rest goes on
            broken_plugins[f"plug-in {point.name}"] = f"{type(err).__name__}: {err}"
            warnings.warn(f"The vistok plug-in {point.name!r} ({point.value}) could not be loaded: {err}", stacklevel=2)


def registry(kind: str) -> Registry:
    """The registry of one kind.

    Raises:
        KeyError: Unknown kind.
    """
    if kind not in _REGISTRIES:
        raise KeyError(f"No registry kind named {kind!r}. {nearest(kind, KINDS)}")
    return _REGISTRIES[kind]


def register(kind: str, name: str) -> Callable[[B], B]:
    """Decorator: enter a builder under a name. The builder remembers both as `registry_kind` and `registry_name`."""

    def add(builder: B) -> B:
        registry(kind).add_builder(name, builder)
        builder.registry_kind, builder.registry_name = kind, name  # type: ignore[attr-defined]
        return builder

    return add


def preset(kind: str, name: str, *, builder: str, weights: Weights | None = None, config: Mapping[str, Any]) -> None:
    """Enter a named configuration of a builder."""
    registry(kind).add_preset(Preset(kind=kind, name=name, builder=builder, config=config, weights=weights))


def list_names(kind: str | None = None, pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Sorted registered names of a kind (of all kinds if None).

    Args:
        kind: One of `KINDS`, or None.
        pattern: Shell pattern such as `titok*`.
        pretrained: Only names with published weights.

    Raises:
        KeyError: Unknown kind.
    """
    kinds = KINDS if kind is None else (kind,)
    return sorted({n for k in kinds for n in registry(k).names(pattern, pretrained=pretrained)})


def info(name: str, kind: str | None = None) -> Info:
    """What is registered under a name: builder, config, weights, licences, published figures.

    Args:
        name: Builder or preset.
        kind: Where to look; needed only if several kinds use the name.

    Raises:
        KeyError: Unknown name, or a name used by several kinds when `kind` is not given.
    """
    hits = [k for k in ([kind] if kind else KINDS) if name in registry(k).names()]
    if not hits:
        what = f"No {kind}" if kind else "Nothing"
        raise KeyError(f"{what} named {name!r} is registered. {nearest(name, list_names(kind))}")
    if len(hits) > 1:
        raise KeyError(f"{name!r} is registered as {' and '.join(hits)}: say which, e.g. kind={hits[0]!r}.")
    builder_name, builder, found = registry(hits[0]).resolve(name)
    summary = (builder.__doc__ or "").strip().split("\n", 1)[0]
    config = copy.deepcopy(dict(found.config)) if found else {}
    weights = found.weights if found else None
    return Info(kind=hits[0], name=name, builder=builder_name, summary=summary, config=config, weights=weights)
