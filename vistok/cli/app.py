"""The application: which commands there are, and what happens to errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import vistok
from vistok.cli import catalogue, convert, demo, errors, evaluate, pictures, prior, runs, scaling, tokenize

# typer carries click as a private module in newer versions; its base of all usage errors is reached this way in all
UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
INTERRUPTED = 130


class Interrupted(Exception):
    """Ctrl-C, kept apart from exit codes."""


class Group(TyperGroup):
    """Commands in the order in which people need them."""

    def invoke(self, ctx: Any) -> Any:
        """As usual; Ctrl-C becomes `Interrupted`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as err:
            raise Interrupted from err


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vistok {vistok.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("list")(catalogue.list_registered)
app.command("info")(catalogue.info)
app.command("train")(runs.train)
app.command("eval")(evaluate.evaluate)
app.command("encode")(pictures.encode)
app.command("decode")(pictures.decode)
app.command("reconstruct")(pictures.reconstruct)
app.command("prior")(prior.prior)
app.command("tokenize")(tokenize.tokenize)
app.command("demo")(demo.demo)
app.command("convert")(convert.convert)
app.add_typer(runs.bench, name="bench")
app.command("scaling")(scaling.scaling)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors (works anywhere).")] = False,
) -> None:
    """Visual tokenizers, quantizers and token compression: pictures to tokens and back."""


def main() -> NoReturn:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code.

    0 is success, 2 an error of the user (one line on stderr), 130 Ctrl-C. Anything else is a bug and is raised.
    """
    words = [word for word in arguments if word != "--debug"] or ["--help"]
    try:
        with errors.warnings_as_lines():
            code = app(args=words, prog_name="vistok", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        errors.say("Interrupted.")
        return INTERRUPTED
    except UsageError as err:
        if said := _usage(err):
            errors.say(said)
        return 2
    except Exception as err:
        if not errors.is_users(err):
            raise
        if len(words) < len(arguments):
            traceback.print_exc()
        errors.say(errors.message(err))
        return 2


def _usage(err: Any) -> str:
    """A mistake in the command line in one line; empty where the help has been printed instead."""
    if not err.format_message().strip():
        return ""
    path = err.ctx.command_path if getattr(err, "ctx", None) is not None else "vistok"
    return f"{' '.join(err.format_message().split())} See {path} --help."
