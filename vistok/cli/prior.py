"""`vistok prior`: what entropy coding of a tokenizer's ids goes by, fitted to pictures and kept beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli import files
from vistok.cli.pictures import Batch, Device, Model, Overwrite, load


def prior(
    model: Model,
    data: Annotated[str, typer.Option(help="Pictures to fit to: files, folders, patterns, separated by commas.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights with their prior; MODEL itself if it is a folder.")],
    crops: Annotated[
        int, typer.Option(min=0, help="Random crops of each picture, half of them mirrored; 0 for the picture itself.")
    ] = 0,
    smallest: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Smallest share of a picture's area of --crops; 0.15.")
    ] = None,
    batch: Batch = 16,
    device: Device = "",
    overwrite: Overwrite = False,
) -> None:
    """Fit the prior of entropy coding to pictures; .vtok files of the model in OUT are then smaller, ids the same.

    Files coded under another prior cannot be read with this one: keep the old folder for them.
    """
    from vistok.cli.show import progress
    from vistok.codec.prior import FILE
    from vistok.evaluate.prior import fit
    from vistok.hub import CONFIG
    from vistok.image import find_pictures

    if smallest is not None and not crops:
        raise typer.BadParameter("--smallest is for --crops, of which there are none.")
    inside = Path(model).is_dir() and out.resolve() == Path(model).resolve()
    files.refuse_existing([out / FILE] if inside else [out / FILE, out / CONFIG], overwrite=overwrite)
    found = list(files.collect(files.listed(data), find_pictures))
    tokenizer = load(model, device)
    with progress("encode", len(found)) as advance:
        fitted = fit(tokenizer, found, batch=batch, crops=crops, smallest=smallest or 0.15, progress=advance)
    tokenizer.prior = fitted.prior
    if inside:
        fitted.prior.save(out)
    else:
        tokenizer.save_pretrained(out)
    each, weights = f", {crops} crops each" if crops else "", "" if inside else " and weights"
    typer.echo(f"Fitted to {files.pictures(fitted.pictures)}{each}; wrote {out / FILE}{weights}.")
    if fitted.measured:
        typer.echo(
            f"Whole files of {files.pictures(fitted.measured)} it was not fitted to (every fifth, under a prior of the "
            f"others): {fitted.packed_bytes:g} bytes packed, {fitted.coded_bytes:.1f} coded, {fitted.saving:.1%} saved."
        )
    broken = files.Broken(dict(fitted.skipped))
    broken.finish()
