"""`vistok list` and `vistok info`: what is registered, printed from the registry."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.registry import KINDS, Info, Weights, list_names, nearest, registry
from vistok.registry import info as info_of

if TYPE_CHECKING:
    from vistok.cli.show import Rows


def list_registered(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}; all if left out.")] = "",
    pattern: Annotated[str, typer.Argument(help="Shell pattern, e.g. 'titok*'.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only names with published weights.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    protocols: Annotated[bool, typer.Option("--protocols", help="What the protocols of vistok eval fix.")] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Published rFID of tokenizers, and the command that measures each.")
    ] = False,
    costs: Annotated[
        Path | None,
        typer.Option(help="Of methods: what they ask for and cost; a file of vistok bench methods."),
    ] = None,
) -> None:
    """List what is registered; protocols of published figures, and the commands that measure them."""
    if protocols or published:
        _list_protocols(pattern if kind == "tokenizer" else kind or "*", published=published, markdown=markdown)
        return
    if kind and kind not in KINDS:
        if not any(c in kind for c in "*?["):
            raise KeyError(f"No registry kind named {kind!r}. {nearest(kind, KINDS)} For a pattern write '*'.")
        kind, pattern = "", kind
    if costs is not None:
        if kind not in ("", "method"):
            raise ValueError(f"--costs is for methods of token compression, not for kind {kind!r}: vistok list method.")
        _list_methods(costs, pattern, markdown=markdown)
        return
    kinds = [k for k in ([kind] if kind else KINDS) if list_names(k, pattern, pretrained=pretrained)]
    if not kinds:
        weighty = " with published weights" if pretrained else ""
        raise KeyError(f"Nothing{weighty} fits {pattern!r}. {nearest(pattern, list_names(kind or None))}")
    for one in kinds:
        rows = table(one, pattern, pretrained=pretrained)
        if markdown:
            typer.echo(rows.markdown())
        else:
            rows.print(title=one if len(kinds) > 1 else "")


def _list_methods(costs: Path, pattern: str, *, markdown: bool) -> None:
    from vistok.cli.show import Rows
    from vistok.evaluate.bench_methods import table as methods

    head, cells = methods(costs)
    fitting = [row for row in cells if fnmatch(row[0], pattern)]
    if not fitting:
        raise KeyError(f"No method fits {pattern!r}. {nearest(pattern, [row[0] for row in cells])}")
    rows = Rows(head, fitting)
    typer.echo(rows.markdown()) if markdown else rows.print()


def _list_protocols(pattern: str, *, published: bool, markdown: bool) -> None:
    from vistok.cli.show import Rows
    from vistok.evaluate import protocols as module

    if published:
        columns, cells = module.rows(pattern)
        if not cells:
            raise KeyError(f"No tokenizer with a published rFID fits {pattern!r}. See vistok list --published.")
    else:
        columns = ("protocol", "fixes", "as")
        cells = [
            row
            for p in module.PROTOCOLS.values()
            for row in ([p.name, "", p.summary], *([p.name, what, how] for what, how in p.fixes().items()))
        ]
    rows = Rows(columns, cells)
    typer.echo(rows.markdown()) if markdown else rows.print()


def info(
    name: Annotated[str, typer.Argument(help="Builder or preset, see vistok list, or the folder of a saved model.")],
    kind: Annotated[str, typer.Option(help="Needed if several kinds use the name.")] = "",
) -> None:
    """Show one entry: what it is, its configuration, licences, published figures with their source."""
    from vistok.cli.show import Rows

    if Path(name).is_dir() and name not in list_names(kind or None):
        Rows(("", ""), _saved_lines(name)).print()
        return
    found = info_of(name, kind or None)
    lines = [("name", f"{found.name} ({found.kind})"), ("what", found.summary), ("builder", found.builder)]
    lines += _weights_lines(found.weights) if found.weights else []
    if found.kind == "tokenizer":
        lines += list(_sizes(found).items())
    lines += [(f"config.{k}", _yaml(v)) for k, v in found.config.items()]
    Rows(("", ""), lines).print()
    if not _is_preset(found):
        Rows(("argument", "type", "default"), _arguments(found)).print()


def table(kind: str, pattern: str = "*", *, pretrained: bool = False) -> Rows:
    """The entries of a kind as a table, one row per name."""
    from vistok.cli.show import Rows

    entries = [info_of(name, kind) for name in list_names(kind, pattern, pretrained=pretrained)]
    columns = ("name", "what it is", "tokens>", "bits per picture>", "pixels>", "M parameters>", "published", "weights")
    return Rows(columns, [_row(entry) for entry in entries])


def _row(entry: Info) -> list[str]:
    sizes = _sizes_or_nothing(entry) if entry.kind == "tokenizer" else {}
    numbers = [sizes.get(key, "") for key in ("tokens", "bits per picture", "pixels", "M parameters")]
    what = f"{entry.builder}, trained on {entry.weights.trained_on}" if entry.weights else entry.summary
    if _is_preset(entry) and not entry.weights:
        what = f"{entry.builder} with settings of its own"
    published = _figures(entry.weights) if entry.weights else ""
    return [entry.name, what, *numbers, published, entry.weights.hub if entry.weights else ""]


def _saved_lines(folder: str) -> list[tuple[str, str]]:
    """What the folder of a tokenizer holds. Its weights are read, so that what does not fit is said."""
    from vistok.cli.pictures import load

    model = load(folder, "cpu")
    lines = [("folder", folder), ("builder", f"{model.registry_name} (tokenizer)"), ("model id", model.model_id)]
    return [*lines, *_facts(model).items(), *((f"config.{k}", _yaml(v)) for k, v in model.config.items())]


def _is_preset(entry: Info) -> bool:
    return entry.name != entry.builder


def _figures(weights: Weights) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in weights.figures.items())


def _weights_lines(weights: Weights) -> list[tuple[str, str]]:
    lines = [
        ("hub", f"{weights.hub or 'none'}, {weights.filename}"),
        ("trained on", weights.trained_on),
        ("published", _figures(weights)),
        ("source", weights.source),
        ("licence of the code", weights.licence_code),
        ("licence of the weights", weights.licence_weights),
        ("sha256", weights.sha256 or ""),
        ("model id", weights.model_id or ""),
    ]
    return [(key, value) for key, value in lines if value]


def _sizes_or_nothing(entry: Info) -> dict[str, str]:
    """As `_sizes`; a preset that cannot be built (of a plug-in, say) is named and does not take the table down."""
    try:
        return _sizes(entry)
    except Exception as err:
        warnings.warn(f"The {entry.kind} preset {entry.name!r} cannot be built: {err}", stacklevel=2)
        return {}


def _sizes(entry: Info) -> dict[str, str]:
    """Token count, rate, picture size and parameters of a tokenizer preset, built without memory."""
    if not _is_preset(entry):
        return {}
    from vistok.hub import on_meta

    return _facts(on_meta(entry.kind, entry.name))


def _facts(model: Any) -> dict[str, str]:
    """Token count, rate, picture size and parameters of a tokenizer."""
    from vistok.hub import count_parameters

    bits = model.num_tokens * model.quantizer.bits
    height, width = model.preprocess.size
    return {
        "tokens": str(model.num_tokens),
        "bits per picture": f"{bits:g}" if bits else f"continuous, {model.quantizer.dim} channels",
        "pixels": f"{height}x{width}",
        "M parameters": f"{count_parameters(model) / 1e6:.1f}",
    }


def _arguments(entry: Info) -> list[tuple[str, str, str]]:
    import inspect

    from vistok.config import describe, schema

    _, builder, _ = registry(entry.kind).resolve(entry.name)
    defaults = inspect.signature(builder).parameters
    return [
        (key, describe(annotation), "required" if required else _yaml(defaults[key].default))
        for key, (annotation, required) in schema(builder).items()
    ]


def _yaml(value: Any) -> str:
    """A value as it would stand in a recipe, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
