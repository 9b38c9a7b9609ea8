"""Checked configuration: YAML and dictionaries in, typed values or one clear error out.

A builder's keyword-only signature is its schema. `check` compares values with it and names the dotted key of
whatever does not fit; `create` checks and builds; `read_yaml` reads a recipe with `key.sub=value` overrides.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from vistok.registry import nearest, registry

Spec = Mapping[str, Any]
MISSING = "???"  # OmegaConf's mark for a value that the reader of a recipe has to fill in


class ConfigError(ValueError):
    """A configuration that does not fit its schema; the message names the dotted key and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Of:
    """Marks a parameter as a nested component: `quantizer: Annotated[Spec, Of("quantizer")]`."""

    kind: str


def create(kind: str, name: str, **config: Any) -> Any:
    """Build a registered component from a builder's or a preset's name.

    Args:
        kind: Registry kind, e.g. `tokenizer` or `quantizer`.
        name: Builder or preset.
        **config: Keyword arguments of the builder; they override those of a preset, key by key.

    Returns:
        The built object.

    Raises:
        KeyError: Unknown kind or name (the message lists the nearest).
        ConfigError: A key that the builder does not take, a missing one, or a value of the wrong type.

    Example:
        >>> import vistok
        >>> vistok.create("quantizer", "vq", codebook_size=1024, dim=8).bits
        10.0
    """
    checked = check_component(kind, {"name": name, **config}, path="")
    _, builder, _ = registry(kind).resolve(checked.pop("name"))
    return builder(**checked)


def check_component(kind: str, spec: Any, path: str) -> dict[str, Any]:
    """Check `{name: ..., ...}` against the builder it names; presets are resolved to builder and full config.

    Args:
        kind: Registry kind the name is looked up in.
        spec: The mapping to check.
        path: Dotted key of the mapping, for messages.

    Returns:
        `{"name": builder name, **keyword arguments}`, nested components checked in the same way.

    Raises:
        ConfigError: The mapping does not fit.
        KeyError: Unknown name.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"{path or kind}: expected {{name: <a {kind}>, ...}}, got {spec!r}.")
    values = dict(spec)
    name = values.pop("name")
    try:
        builder_name, builder, found = registry(kind).resolve(name)
    except KeyError as err:
        raise ConfigError(f"{_join(path, 'name')}: {err.args[0]}") if path else err from None
    if found is not None:
        values = merge(found.config, values)
    return {"name": builder_name, **check_call(builder, values, path=path, what=f"{kind} {name!r}")}


def check_call(builder: Callable[..., Any], values: Mapping[str, Any], *, path: str, what: str) -> dict[str, Any]:
    """Check keyword arguments against a callable's signature.

    Args:
        builder: Class, dataclass or function.
        values: The keyword arguments.
        path: Dotted key they stand under, for messages.
        what: Name of the callable for messages, e.g. `quantizer 'vq'`.

    Returns:
        The arguments, converted where that loses nothing (int to float, list to tuple).

    Raises:
        ConfigError: Unknown key, missing key or wrong type.
    """
    parameters = schema(builder)
    for key in values:
        if key not in parameters:
            raise ConfigError(f"{_join(path, key)}: {what} has no such key. {nearest(key, parameters)}")
    checked = {}
    for key, (annotation, required) in parameters.items():
        if key in values:
            checked[key] = check_value(values[key], annotation, _join(path, key))
        elif required:
            raise ConfigError(f"{_join(path, key)}: {what} needs this key ({describe(annotation)}); it has no default.")
    return checked


def check_value(value: Any, annotation: Any, path: str) -> Any:
    """Check one value against an annotation; see `check_call`.

    Raises:
        ConfigError: The value is not of that type, or still `???`.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(f"{path}: this value is left open ({MISSING}); give {describe(annotation)}.")
    if annotation is Any or isinstance(annotation, TypeVar):
        return value
    if origin is Annotated:
        of = next((m for m in args[1:] if isinstance(m, Of)), None)
        if of is None:
            return check_value(value, args[0], path)
        optional = type(None) in get_args(args[0])
        return None if value is None and optional else check_component(of.kind, value, path)
    if origin in (Union, types.UnionType):
        return _check_union(value, args, annotation, path)
    if origin is Literal:
        if any(type(value) is type(a) and value == a for a in args):  # True is not 1
            return value
        raise ConfigError(
            f"{path}: expected {describe(annotation)}, got {value!r}. {nearest(value, args, listing=False)}".rstrip()
        )
    if dataclasses.is_dataclass(annotation):
        return _check_dataclass(value, annotation, path)
    if origin in (list, tuple, Sequence) or annotation in (list, tuple, Sequence):
        return _check_sequence(value, origin or annotation, args, annotation, path)
    if origin in (dict, Mapping) or annotation in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}.")
        of_value = args[1] if args else Any
        return {str(k): check_value(v, of_value, _join(path, str(k))) for k, v in value.items()}
    return _check_plain(value, annotation, path)


def describe(annotation: Any) -> str:
    """An annotation in words, for messages and tables."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        of = next((m for m in args[1:] if isinstance(m, Of)), None)
        return f"{{name: <a {of.kind}>, ...}}" if of else describe(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values ({', '.join(describe(a) for a in args)})"
    if origin in (list, tuple, Sequence):
        return f"a list of {describe(args[0])}" if args else "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return getattr(annotation, "__name__", str(annotation))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; a nested component whose `name` changes is replaced as a whole, not mixed with the old one."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        same = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        )
        merged[key] = merge(old, value) if same else value  # type: ignore[arg-type]
    return merged


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what JSON and YAML know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply `key.sub=value` overrides (interpolations are resolved).

    An override sets exactly its key: `model.quantizer={name: fsq, levels: [8, 8]}` replaces the whole quantizer,
    `model.quantizer.dim=8` one value of it.

    Raises:
        ConfigError: No such file, not YAML, or an override that is not `key=value`.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.yaml")]
        near = nearest(path.name, beside) if beside else ""
        raise ConfigError(f"There is no recipe {str(path)!r}. {near}".rstrip())
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as err:
        raise ConfigError(f"{path} is not a YAML file: {_one_line(err)}") from err
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections at the top.")
    for override in overrides:
        _apply_override(config, override)
    try:
        found = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as err:
        raise ConfigError(f"{path}: {_one_line(err)}") from err
    return typing.cast(dict[str, Any], found)


def value_of(text: str) -> Any:
    """The value that a text stands for on the right of an override: `0.5`, `null`, `[2, 6]`, `{mean: 192}`, a word.

    Raises:
        yaml.YAMLError: A bracket that is not closed and the like.
    """
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return found["value"]  # type: ignore[index,call-overload]


def from_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Values given as `key.sub=value` alone.

    Raises:
        ConfigError: One is not `key=value`.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.create({})
    for override in overrides:
        _apply_override(config, override)
    return typing.cast(dict[str, Any], OmegaConf.to_container(config))


def _apply_override(config: Any, override: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"{override!r} is not an override. Write key.sub=value, e.g. train.steps=100.")
    try:
        OmegaConf.update(config, key, value_of(text), merge=False)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as err:
        raise ConfigError(f"{override!r} cannot be applied: {_one_line(err)}") from err


def _one_line(err: Exception) -> str:
    """The gist of a parser's error: the problem and where, without its drawing of the place."""
    mark = getattr(err, "problem_mark", None)
    if mark is not None:
        return f"{err.problem} (line {mark.line + 1}, column {mark.column + 1})."  # type: ignore[attr-defined]
    return str(err).strip().split("\n", 1)[0]


def write_yaml(value: Any, path: str | Path) -> None:
    """Write a configuration as YAML."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(plain(value)), path)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def schema(builder: Callable[..., Any]) -> dict[str, tuple[Any, bool]]:
    """Parameter name -> (annotation, required) of a callable.

    Raises:
        TypeError: It takes `*args` or `**kwargs`, which would let any key through.
    """
    target = builder
    if inspect.isclass(builder):
        owner = next(c for c in builder.__mro__ if "__init__" in vars(c))
        if owner.__module__.startswith("torch.nn."):  # a module without a constructor of its own
            return {}
        target = vars(owner)["__init__"]
    hints = typing.get_type_hints(inspect.unwrap(target), include_extras=True)
    schema = {}
    for p in inspect.signature(builder).parameters.values():
        if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            raise TypeError(f"{builder!r} takes *args or **kwargs: a registered builder spells out its keywords.")
        schema[p.name] = (hints.get(p.name, Any), p.default is p.empty)
    return schema


def _check_union(value: Any, args: tuple[Any, ...], annotation: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [a for a in args if a is not type(None)]
    if len(rest) == 1:
        return check_value(value, rest[0], path)
    inside = None
    for arg in sorted(rest, key=lambda a: a is not type(value)):  # the exact type first: 3 stays an int in int | float
        try:
            return check_value(value, arg, path)
        except ConfigError as err:  # an error further inside says more than "expected this or that"
            inside = inside or (None if str(err).startswith(f"{path}: ") else err)
    raise inside or ConfigError(f"{path}: expected {describe(annotation)}, got {value!r}.")


def _check_dataclass(value: Any, annotation: Any, path: str) -> Any:
    if isinstance(value, annotation):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a mapping with {', '.join(schema(annotation))}, got {value!r}.")
    return annotation(**check_call(annotation, value, path=path, what=f"'{path or annotation.__name__}'"))


def _check_sequence(value: Any, origin: Any, args: tuple[Any, ...], annotation: Any, path: str) -> Any:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise ConfigError(f"{path}: expected {describe(annotation)}, got {value!r}.")
    fixed = origin is tuple and args and args[-1] is not Ellipsis
    if fixed and len(value) != len(args):
        raise ConfigError(f"{path}: expected {len(args)} values, got {len(value)} ({value!r}).")
    of = args if fixed else [args[0] if args else Any] * len(value)
    items = [check_value(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, of))]
    return items if origin is list else tuple(items)


def _check_plain(value: Any, annotation: Any, path: str) -> Any:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    wrong_bool = isinstance(value, bool) and annotation is not bool
    if not isinstance(annotation, type) or (isinstance(value, annotation) and not wrong_bool):
        return value
    raise ConfigError(f"{path}: expected {describe(annotation)}, got {value!r} ({type(value).__name__}).")
