"""`vistok train`, `eval` and `bench`: what takes its time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vistok.cli import files
from vistok.cli.pictures import Batch, Device, Model, Overwrite, load

if TYPE_CHECKING:
    from vistok.evaluate.run import EvalResult

SIGNALLED = 130
bench = typer.Typer(help="Time vistok against the straightforward way, in one run.", no_args_is_help=True)


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML), see recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.steps=100")
    ] = None,
) -> None:
    """Train what a recipe says, or continue it; evaluate and save it."""
    from vistok.evaluate.protocol import command
    from vistok.train.loop import train as run
    from vistok.train.recipe import load as read

    result = run(read(recipe, overrides or []), command=command())
    if result.stopped == "signal":
        raise typer.Exit(SIGNALLED)


def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Pictures: files, folders, patterns, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    metrics: Annotated[str, typer.Option(help="Separated by commas, see vistok list metric.")] = "psnr,ssim,lpips_alex",
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per picture, for nested tokenizers.")] = None,
    batch: Batch = 16,
    device: Device = "",
    overwrite: Overwrite = False,
) -> None:
    """Measure a tokenizer on pictures; write figures with their protocol and a page to look at."""
    from vistok.cli.show import progress
    from vistok.evaluate.run import evaluate as run
    from vistok.image import find_pictures

    found = list(files.collect(files.listed(data), find_pictures))
    files.refuse_existing([out / "metrics.json"], overwrite=overwrite)
    tokenizer = load(model, device)
    with progress("evaluate", len(found)) as advance:
        result = run(
            tokenizer,
            found,
            metrics=files.listed(metrics),
            out=out,
            batch=batch,
            name=model,
            num_tokens=tokens,
            progress=advance,
        )
    _print_result(result)
    files.Broken({Path(path): why for path, why in result.skipped.items()}).finish()


def _print_result(result: EvalResult) -> None:
    from vistok.cli.show import Rows

    cells = []
    for name, value in result.figures.items():
        low, high = result.intervals.get(name, (value, value))
        interval = f"{low:.4g} to {high:.4g}" if name in result.intervals else ""
        cells.append((result.labels[name], f"{value:.4g}", interval))
    facts = {**result.usage, **result.rate, **result.speed, **result.baselines}
    cells += [(name.replace("_", " "), f"{value:.4g}", "") for name, value in facts.items()]
    Rows((f"{result.pictures} pictures", "value>", "95 % interval"), cells).print()
    for path in result.files.values():
        typer.echo(f"Wrote {path}")


@bench.command("tokenizer")
def bench_tokenizer(
    model: Annotated[str, typer.Option(help="A TiTok preset; its weights are random here.")] = "titok_s128.in1k",
    batch: Annotated[int, typer.Option(min=1, help="Pictures per batch.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds after one warm-up.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own number by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result; replaced if it exists.")] = None,
) -> None:
    """Encode and decode against a plain implementation with the same weights."""
    import json

    from vistok.cli.show import Rows
    from vistok.evaluate.bench_tokenizer import run
    from vistok.hub import write_atomic

    result = run(model, batch=batch, rounds=rounds, threads=threads)
    cells = [
        (
            r["operation"],
            r["precision"],
            f"{r['seconds']:.3f}",
            f"{r['images_per_s']:.2f}",
            f"{r['ratio']:.2f}",
            r["against"],
        )
        for r in result.rows
    ]
    Rows(("operation", "precision", "s per batch>", "pictures per s>", "times as fast>", "as"), cells).print()
    shares = ", ".join(
        f"{result.transformer_share[p]:.0%} of {peak:.0f} GFLOP/s in {p}" for p, peak in result.peak_gflops.items()
    )
    typer.echo(f"Transformer of the encoder reaches {shares}. Ids that bf16 leaves equal: {result.equal_ids:.2%}.")
    if out is not None:
        write_atomic(out, json.dumps(result.to_dict(), indent=2).encode())
        typer.echo(f"Wrote {out}")
