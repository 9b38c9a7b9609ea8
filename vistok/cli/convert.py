"""`vistok convert`: somebody else's checkpoint becomes a folder in vistok's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli import files
from vistok.registry import registry


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder or weight file of a project, preset, or hf-hub:org/name.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for config.json and model.safetensors.")],
    config: Annotated[
        Path | None, typer.Option(help="Configuration that lies elsewhere: YAML, JSON or Python, read as data.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
) -> None:
    """Read an official checkpoint, executing nothing of it, and write it in vistok's format."""
    from vistok import hub
    from vistok.tokenizers.load import load

    targets = [out / hub.CONFIG, out / hub.WEIGHTS]
    files.refuse_existing(targets, overwrite=overwrite)
    model = load(source, config=config)
    model.save_pretrained(out)
    count, rate = hub.count_parameters(model), f"{model.num_tokens} tokens"
    if model.registry_kind == "tokenizer":
        bits = model.num_tokens * model.quantizer.bits
        rate += f", {bits:g} bits" if bits else ", continuous latents"
    typer.echo(f"{model.registry_name} {model.model_id}: {count / 1e6:.2f} M parameters, {rate} per picture.")
    for path in targets:
        typer.echo(f"Wrote {path}")
    preset = registry("tokenizer").presets.get(source)
    if preset is not None and preset.weights is not None:
        typer.echo(f"Licence of the weights: {preset.weights.licence_weights}.")
