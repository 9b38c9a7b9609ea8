"""`vistok eval`: figures of a tokenizer on pictures, beside codecs, or of its features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli import files
from vistok.cli import probe as probing
from vistok.cli.pictures import Batch, Caption, Device, Model, Overwrite, load

if TYPE_CHECKING:
    from vistok.evaluate.run import EvalResult
    from vistok.tokenizers.base import Tokenizer

METRICS = "psnr,ssim,lpips_alex"


def evaluate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    data: Annotated[str, typer.Option(help="Pictures: files, folders, patterns, separated by commas.")] = "",
    metrics: Annotated[
        str,
        typer.Option(help=f"Separated by commas, see vistok list metric; {METRICS}, more with --rate-distortion."),
    ] = "",
    protocol: Annotated[
        str, typer.Option(help="rFID and IS as in a published table besides, see vistok list --protocols.")
    ] = "",
    reference: Annotated[
        Path | None,
        typer.Option(help="Where Frechet distances are from: a folder, or .npz statistics; the originals by default."),
    ] = None,
    probe: Annotated[
        Path | None, typer.Option(help="Folder whose sub-folders are classes: k-NN and linear probe of the features.")
    ] = None,
    point: Annotated[
        str,
        typer.Option(help="Where to probe: features (before the quantizer), codes, published, a submodule's path."),
    ] = "features",
    pool: Annotated[
        probing.Pool, typer.Option(help="Features of a picture: mean over tokens, or all of them.")
    ] = probing.Pool.mean,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per picture, for nested tokenizers.")] = None,
    rate_distortion: Annotated[
        bool, typer.Option("--rate-distortion", help="Compare a nested model with JPEG, WebP and AVIF at equal bytes.")
    ] = False,
    budgets: Annotated[str, typer.Option(help="Bytes of whole files for --rate-distortion.")] = "64,112,208,256",
    caption: Caption = None,
    lengths: Annotated[
        str, typer.Option(help="Token counts to decode the same tokens at besides, e.g. 1,4,16,64 (nested tokenizers).")
    ] = "",
    batch: Batch = 16,
    device: Device = "",
    overwrite: Overwrite = False,
) -> None:
    """Measure a tokenizer on pictures, probe its features, or both; write figures with their protocol and a page.

    Under accelerate launch the pictures of --data are shared among the processes, with the same figures.
    """
    if not data and probe is None:
        raise ValueError("There is nothing to do: give pictures with --data, a labelled folder with --probe, or both.")
    if reference is not None and (not data or rate_distortion or protocol):
        raise typer.BadParameter(
            "--reference changes what the Frechet distances of --data are from: it goes neither with --rate-distortion "
            "nor with --protocol, which fixes its own."
        )
    from vistok.image import find_pictures
    from vistok.train import launch

    launch.start_missing_processes()
    from vistok.evaluate import protocols

    conditions = protocols.find(protocol) if protocol else None
    figures = "rate_distortion.json" if rate_distortion else "metrics.json"
    asked = {figures: data, probing.FILE: probe}
    files.refuse_existing([out / name for name, wanted in asked.items() if wanted], overwrite=overwrite)
    found = list(files.collect(files.listed(data), find_pictures))
    first = True
    if launch.is_one_of_several():
        state = launch.join()
        device, first = str(state.device), state.is_main_process
    tokenizer = load(model, device)
    labelled = probing.opened(tokenizer, probe, point) if probe is not None else None
    broken = files.Broken()
    if found and rate_distortion:
        if first:
            chosen = {"metrics": files.listed(metrics)} if metrics else {}
            limits = files.numbers(budgets, "--budgets")
            broken.reasons |= _compare(tokenizer, found, out, budgets=limits, name=model, **chosen)
    elif found:
        names = files.listed(metrics or METRICS)
        options: dict[str, Any] = {
            "lengths": files.numbers(lengths, "--lengths"),
            "num_tokens": tokens,
            "text": captions(caption, found),
            "batch": batch,
            "name": model,
            "conditions": conditions,
            "reference": reference,
        }
        skipped = _measure(tokenizer, found, out, first=first, metrics=names, **options)
        broken.reasons |= skipped if first else {}
    if labelled is not None and first:
        broken.reasons |= probing.run(
            tokenizer, labelled, out, point=point, pool=pool, num_tokens=tokens, batch=batch, name=model
        )
    broken.finish()


def _compare(tokenizer: Tokenizer, found: list[Path], out: Path, **options: Any) -> dict[Path, str]:
    """Rate and distortion beside the codecs; pictures that could not be used. See `evaluate.rate_distortion.run`."""
    from vistok.cli.show import Rows
    from vistok.evaluate.rate_distortion import run

    result = run(tokenizer, found, out=out, **options)
    columns = list(result.rows[0])
    cells = [
        ["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()] for r in result.rows
    ]
    Rows((columns[0], *(f"{c}>" for c in columns[1:])), cells).print()
    if result.saving:
        typer.echo(
            "A full code takes {packed_bytes:g} bytes packed, {coded_bytes:g} entropy-coded.".format(**result.saving)
        )
    broken = {path: why for path in found if (why := result.skipped.get(str(path))) is not None}
    for what, why in result.skipped.items():
        if Path(what) not in broken:
            typer.echo(f"Left out, {what}: {why}")
    for path in result.files.values():
        typer.echo(f"Wrote {path}")
    return broken


def _measure(tokenizer: Tokenizer, found: list[Path], out: Path, *, first: bool, **options: Any) -> dict[Path, str]:
    """Reconstruct and measure; pictures that could not be used, with the reason. See `evaluate.run.evaluate`.

    Only the first process speaks.
    """
    from vistok.cli.show import progress
    from vistok.distributed import world_size
    from vistok.evaluate.run import evaluate as run

    with progress("evaluate", -(-len(found) // world_size())) as advance:
        result = run(tokenizer, found, out=out, progress=advance if first else None, **options)
    if first:
        _print_result(result)
    return {Path(path): why for path, why in result.skipped.items()}


def _print_result(result: EvalResult) -> None:
    from vistok.cli.show import Rows

    cells = []
    for name, value in result.figures.items():
        low, high = result.intervals.get(name, (value, value))
        interval = f"{low:.4g} to {high:.4g}" if name in result.intervals else ""
        cells.append((result.labels[name], f"{value:.4g}", interval))
    facts = {**result.besides, **result.usage, **result.rate, **result.speed, **result.baselines}
    cells += [(name.replace("_", " "), f"{value:.4g}", "") for name, value in facts.items()]
    Rows((files.pictures(result.pictures), "value>", "95 % interval"), cells).print()
    for name, why in result.unmeasured.items():
        typer.echo(f"Left out, {name}: {why}")
    for path in result.files.values():
        typer.echo(f"Wrote {path}")


def captions(caption: str | None, found: Sequence[Path]) -> str | dict[Path, str] | None:
    """The caption of every picture: one for all, or one with the name of its folder in place of `{class}`."""
    if caption is None or "{class}" not in caption:
        return caption
    return {file: caption.replace("{class}", file.parent.name) for file in found}
