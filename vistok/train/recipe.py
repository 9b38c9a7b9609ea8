"""Recipes: one flat, complete YAML file, checked to the last key before anything heavy runs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from vistok.config import ConfigError, Of, Spec, check_component, check_value, plain, read_yaml
from vistok.registry import nearest, registry
from vistok.train import optim
from vistok.train.steps.base import LossSpec, Step, Weighting

SECTIONS = ("model", "data", "losses", "optim", "train", "eval")
MAY_CHANGE = (
    "train.out",
    "train.resume",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.trackers",
    "train.max_seconds",
    "train.max_bad_steps",
    "train.gradient_checkpointing",
    "data.workers",
    "data.prefetch",
    "data.cache_mb",
    "eval",
)
"""Keys that may differ between a run and its continuation: they do not change the weights."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """The keys of `data` that belong to the loader, not to the data set.

    Attributes:
        image_size: Side, or [height, width]; null for the model's own size.
        crop: `random`, `resized`, `center` or `squash`; see `vistok.data.augment.Augment`.
        scale: Range of the area's share, for `resized`.
        ratio: Range of the aspect's stretch, for `resized`.
        flip: Probability of a horizontal flip.
        resample: Pillow filter.
        workers: Worker processes; 0 prepares batches in a background thread.
        prefetch: Batches prepared ahead.
        cache_mb: Memory for decoded pictures, per worker.
    """

    image_size: int | tuple[int, int] | None = None
    crop: Literal["random", "resized", "center", "squash"] = "random"
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    resample: Literal["bicubic", "bilinear", "lanczos", "box", "nearest"] = "bicubic"
    workers: int = 0
    prefetch: int = 2
    cache_mb: float = 256.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"data.scale: expected 0 < smallest <= largest <= 1, got {list(self.scale)}.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"data.ratio: expected 0 < smallest <= largest, got {list(self.ratio)}.")
        _within("data.flip", self.flip, 0, 1)
        _within("data.workers", self.workers, 0)
        _within("data.prefetch", self.prefetch, 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The section `train`.

    Attributes:
        steps: Optimiser steps.
        global_batch: Pictures per step over all processes and accumulation.
        out: Folder of the run.
        step: The objective, `{name: <a step>, ...}`.
        batch: Most pictures a process takes at once; the rest is accumulated. null for no limit.
        precision: `fp32`, `bf16` (autocast), or `auto`: bf16 where the hardware multiplies it natively.
        ema: Decay of the averaged weights, which are evaluated and saved; 0 for none.
        seed: Keys order, crops, noise and the model's start.
        init_from: Checkpoint or preset whose weights the model starts from.
        freeze: Name patterns of parameters that are not trained.
        compile: Compile the model (pays in long runs only).
        gradient_checkpointing: Recompute the activations of transformer blocks in the backward pass instead of keeping
            them: less memory, more time, the same weights.
        log_every: Steps between log lines.
        save_every: Steps between checkpoints; 0 for one at the end only.
        keep: Checkpoints kept.
        trackers: Accelerate trackers by name, besides `metrics.jsonl`.
        resume: `auto` continues what is in `out` (a changed recipe is refused), `never` refuses a used folder,
            `anyway` continues in spite of changes.
        max_seconds: Time limit of the training steps over all continuations; the learning rate follows it.
        max_bad_steps: Non-finite steps in a row that end the run.
    """

    steps: int
    global_batch: int
    out: Path
    step: Annotated[Spec, Of("step")] = field(default_factory=lambda: {"name": "reconstruct"})
    batch: int | None = None
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    ema: float = 0.999
    seed: int = 0
    init_from: str | None = None
    freeze: tuple[str, ...] = ()
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 10
    save_every: int = 1000
    keep: int = 2
    trackers: tuple[str, ...] = ("tensorboard",)
    resume: Literal["auto", "never", "anyway"] = "auto"
    max_seconds: float | None = None
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        for key in ("steps", "global_batch", "log_every", "keep", "max_bad_steps"):
            _within(f"train.{key}", getattr(self, key), 1)
        for key in ("save_every", "seed"):
            _within(f"train.{key}", getattr(self, key), 0)
        _within("train.batch", self.batch if self.batch is not None else 1, 1)
        _within("train.ema", self.ema, 0, 1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The section `eval`.

    Attributes:
        data: Data set of whole held-out pictures; null for no evaluation.
        metrics: Registered metrics.
        batch: Pictures at once.
        every: Steps between evaluations while training; 0 for one at the end only.
        lengths: Token counts to decode the same tokens at besides, for nested tokenizers: a table and a picture.
    """

    data: Annotated[Spec | None, Of("dataset")] = None
    metrics: tuple[str, ...] = ("psnr", "ssim", "lpips_alex")
    batch: int = 16
    every: int = 0
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe; what YAML left out has its default.

    Attributes:
        model: Spec of the model: builder name and all arguments that were given.
        data: Spec of the data set.
        loader: How its pictures are cut and read ahead.
        losses: Entries of `losses` by name.
        optims: Optimiser of every part of the step.
        train: The section `train`.
        eval: The section `eval`.
        source: File it was read from, None for a dictionary.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    loader: LoaderConfig
    losses: dict[str, LossSpec]
    optims: dict[str, optim.Optimizer]
    train: TrainConfig
    eval: EvalConfig
    source: Path | None = None

    def resolved(self) -> dict[str, Any]:
        """The complete recipe as plain values, defaults written out; `from_dict` gives the same recipe again."""
        first, *others = ({"name": optim.name_of(o), **plain(o)} for o in self.optims.values())
        names = list(self.optims)[1:]
        losses = {n: {**plain(e.weighting), **plain(e.spec or {})} for n, e in self.losses.items()}
        return {
            "model": plain(self.model),
            "data": {**plain(self.data), **plain(self.loader)},
            "losses": losses,
            "optim": {**first, "parts": dict(zip(names, others))} if others else first,
            "train": plain(self.train),
            "eval": plain(self.eval),
        }

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Dotted keys, with both values, in which a stored recipe differs and must not for a continuation."""
        mine, theirs = dict(flatten(self.resolved())), dict(flatten(other))
        keys = [k for k in dict.fromkeys([*theirs, *mine]) if mine.get(k) != theirs.get(k)]
        fixed = [k for k in keys if not any(k == may or k.startswith(may + ".") for may in MAY_CHANGE)]
        return [f"{k}: was {theirs.get(k)!r}, is {mine.get(k)!r}" for k in fixed]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file with `key.sub=value` overrides and check every key of it.

    Raises:
        ConfigError: Names the dotted key that does not fit, and the nearest known one.

    Example:
        >>> recipe = load("recipes/quickstart.yaml", ["train.steps=100"])
    """
    return from_dict(read_yaml(path, overrides), source=Path(path))


def from_dict(values: Mapping[str, Any], source: Path | None = None) -> Recipe:
    """Check a recipe given as a dictionary of sections; see `load`."""
    for section in values:
        if section not in SECTIONS:
            raise ConfigError(f"{section}: a recipe has no such section. {nearest(section, SECTIONS)}")
    _refuse_missing(values)
    sections = {name: _mapping(values.get(name), name) for name in SECTIONS}
    train = check_value(sections["train"], TrainConfig, "train")
    step = step_class(train.step)
    data, loader = _check_data(sections["data"])
    return Recipe(
        model=check_component(step.model_kind, sections["model"], "model"),
        data=data,
        loader=loader,
        losses=_check_losses(sections["losses"], step),
        optims=_check_optims(sections["optim"], step),
        train=train,
        eval=_check_eval(sections["eval"]),
        source=source,
    )


def step_class(spec: Mapping[str, Any]) -> type[Step]:
    """The class behind a step's spec."""
    found: type[Step] = registry("step").resolve(spec["name"])[1]  # type: ignore[assignment]
    return found


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves of nested mappings; lists are leaves."""
    if isinstance(value, Mapping) and value:
        for key, sub in value.items():
            yield from flatten(sub, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _refuse_missing(values: Mapping[str, Any]) -> None:
    missing = [key for key, value in flatten(values) if value == "???"]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no value yet. Give it on the command line, e.g. {missing[0]}=...")
    for section in ("model", "data", "optim", "train"):
        if section not in values:
            raise ConfigError(f"{section}: the recipe has no such section; it needs one.")


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected a mapping, got {value!r}.")
    return dict(value or {})


def _check_data(values: dict[str, Any]) -> tuple[dict[str, Any], LoaderConfig]:
    """Split the section `data` into the data set's keys and the loader's."""
    own = {f.name for f in dataclasses.fields(LoaderConfig)}
    spec = {k: v for k, v in values.items() if k not in own}
    try:
        checked = check_component("dataset", spec, "data")
    except ConfigError as err:
        unknown = [k for k in spec if str(err).startswith(f"data.{k}: dataset")]
        raise ConfigError(f"{err} The loader's keys: {', '.join(sorted(own))}.") from None if unknown else err
    config = check_value({k: v for k, v in values.items() if k in own}, LoaderConfig, "data")
    return checked, config


def _check_losses(values: dict[str, Any], step: type[Step]) -> dict[str, LossSpec]:
    """`{lpips: {weight: 0.1, net: vgg}}`: the keys of a weighting, the rest belongs to the loss."""
    own = {f.name for f in dataclasses.fields(Weighting)}
    found = {}
    for name, entry in values.items():
        path = f"losses.{name}"
        entry = {"weight": entry} if isinstance(entry, (int, float)) else _mapping(entry, path)
        weighting = check_value({k: v for k, v in entry.items() if k in own}, Weighting, path)
        rest = {"name": name, **{k: v for k, v in entry.items() if k not in own}}
        known = [*registry("loss").names(), *step.own_losses]
        if rest["name"] not in known:
            raise ConfigError(f"{path}: no such loss. {nearest(str(rest['name']), known)}")
        if name not in step.own_losses and not _compares(str(rest["name"])):
            raise ConfigError(
                f"{path}: {rest['name']!r} does not compare two pictures; a step may take it as a setting."
            )
        if name in step.own_losses and len(rest) > 1:
            key = next(k for k in rest if k != "name")
            raise ConfigError(f"{path}.{key}: {name!r} takes only {', '.join(sorted(own))}.")
        found[name] = LossSpec(weighting, None if name in step.own_losses else check_component("loss", rest, path))
    return found


def _compares(name: str) -> bool:
    """Whether a registered loss takes a reconstruction and its target (adversarial losses and critics do not)."""
    parameters = inspect.signature(registry("loss").resolve(name)[1].forward).parameters  # type: ignore[attr-defined]
    return {"reconstruction", "target"} <= set(parameters)


def _check_optims(values: dict[str, Any], step: type[Step]) -> dict[str, optim.Optimizer]:
    """The first part takes the section itself; `parts` holds what differs for the others."""
    parts = _mapping(values.pop("parts", None), "optim.parts")
    first, *others = step.parts
    for name in parts:
        if name not in others:
            hint = nearest(name, others) if others else f"It has one optimiser, that of {first!r}."
            raise ConfigError(f"optim.parts.{name}: step {step.registry_name!r} has no such part. {hint}")
    found = {first: optim.check(values, "optim")}
    for name in others:
        given = _mapping(parts.get(name), f"optim.parts.{name}")
        base = values if given.get("name", values.get("name")) == values.get("name") else {}
        found[name] = optim.check({**base, **given}, f"optim.parts.{name}" if given else "optim")
    return found


def _check_eval(values: dict[str, Any]) -> EvalConfig:
    config: EvalConfig = check_value(values, EvalConfig, "eval")
    known = registry("metric").names() if config.data is not None else []
    for metric in config.metrics if known else ():
        if metric not in known:
            raise ConfigError(f"eval.metrics: no metric is called {metric!r}. {nearest(metric, known)}")
    return config


def _within(key: str, value: float, low: float, high: float | None = None) -> None:
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"{low}..{high}"
        raise ConfigError(f"{key}: expected {span}, got {value}.")
