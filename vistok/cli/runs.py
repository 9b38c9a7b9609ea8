"""`vistok train` and `bench`: what takes its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vistok.cli import files
from vistok.cli.files import JsonFile, Plot
from vistok.cli.pictures import Device, Model, load
from vistok.cli.vlm import Clock, Dtype, Task

SIGNALLED = 130
bench = typer.Typer(help="Time vistok against the straightforward way, in one run.", no_args_is_help=True)


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML), see recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.steps=100")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure 20 steps and say what the run would cost.")
    ] = False,
) -> None:
    """Train what a recipe says, or continue it; evaluate and save it.

    Several processes: accelerate launch --num_processes 8 -m vistok train RECIPE (on CPUs: --cpu --num_processes 2).

    With the model cut into shards (FSDP): accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8
    --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap Block -m vistok train RECIPE
    """
    from vistok.train.launch import start_missing_processes

    start_missing_processes()
    from vistok.evaluate.protocol import command
    from vistok.train.loop import train as run
    from vistok.train.recipe import load as read

    if estimate:
        from vistok.train.estimate import estimate as reckon

        typer.echo(str(reckon(read(recipe, overrides or []))))
        return
    result = run(read(recipe, overrides or []), command=command())
    if result.stopped == "signal":
        raise typer.Exit(SIGNALLED)


@bench.command("tokenizer")
def bench_tokenizer(
    preset: Annotated[
        str, typer.Argument(metavar="MODEL", help="A TiTok or FlexTok preset; weights are random.")
    ] = "titok_s128.in1k",
    model: Annotated[str, typer.Option(hidden=True, help="The same.")] = "",
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures per batch; 2, or 8 for FlexTok.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed rounds; 7, or 3 for FlexTok.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own, or 1 for FlexTok.")] = None,
    tokens: Annotated[str, typer.Option(help="FlexTok: numbers of tokens, separated by commas.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="FlexTok: sampling steps; 2 by default.")] = None,
    out: JsonFile = None,
) -> None:
    """Encode and decode, or sample, against a plain implementation with the same weights."""
    from vistok.evaluate import bench_flow

    model = model or preset
    given = {"batch": batch, "rounds": rounds, "threads": threads}
    given = {name: value for name, value in given.items() if value is not None}
    if bench_flow.takes(model):
        write_json(out, _bench_flow(model, files.numbers(tokens or "8,32,64", "--tokens"), steps or 2, given))
    elif tokens or steps:
        raise ValueError(f"--tokens and --steps are for FlexTok models, and {model} is none.")
    else:
        write_json(out, _bench_titok(model, given))


def _bench_flow(model: str, tokens: Sequence[int], steps: int, given: dict[str, Any]) -> dict[str, Any]:
    """Time a FlexTok's sampler and print what was found."""
    from vistok.cli.show import Rows
    from vistok.evaluate import bench_flow

    result = bench_flow.run(model, tokens=tokens, steps=steps, **given)
    heads = ("tokens>", "CPU s per batch>", "times as fast as plain>", "as packed>", "largest difference>")
    Rows(heads, bench_flow.table(result)).print()
    typer.echo(
        f"Latents of {result.batch} pictures, {result.steps} steps, guidance {result.guidance:g}, width "
        f"{result.width}; CPU time of the process, {result.threads} thread(s), without the autoencoder."
    )
    return result.to_dict()


def _bench_titok(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """Time a TiTok and print what was found."""
    from vistok.cli.show import Rows
    from vistok.evaluate.bench_tokenizer import run

    result = run(model, **given)
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
    return result.to_dict()


@bench.command("samplers")
def bench_samplers(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Pictures: files, folders, patterns; bundled held-out ones by default.")
    ] = "",
    samplers: Annotated[str, typer.Option(help="Separated by commas.")] = "euler,ab2,heun,midpoint,rk4",
    evaluations: Annotated[str, typer.Option(help="Network evaluations, separated by commas.")] = "1,2,4,8,16",
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per picture; all by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the model's own by default.")] = None,
    device: Device = "",
    out: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Quality of a trained flow decoder against the number of network evaluations, for every sampler."""
    from vistok.cli.show import Rows
    from vistok.config import create
    from vistok.evaluate import bench_samplers as module
    from vistok.image import find_pictures

    listed = files.listed(data)
    found = list(files.collect(listed, find_pictures)) if listed else create("dataset", "photos", split="heldout").files
    result = module.run(
        load(model, device),
        found,
        samplers=files.listed(samplers),
        evaluations=files.numbers(evaluations, "--evaluations"),
        tokens=tokens,
        guidance=guidance,
        name=model,
    )
    cells = [
        (r["sampler"], *(str(r[k]) for k in ("steps", "evaluations")), *(f"{r[k]:.4g}" for k in module.QUALITIES))
        for r in result.rows
    ]
    Rows(("sampler", "steps>", "evaluations>", "PSNR>", "LPIPS>", f"from {result.reference}>"), cells).print()
    if plot is not None:
        files.make_folders([plot])
        module.plot(result, plot)
        typer.echo(f"Wrote {plot}")
    write_json(out, result.to_dict())


@bench.command("quantizers")
def bench_quantizers(
    kinds: Annotated[str, typer.Option(help="Registered names or labels, separated by commas; all by default.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Crops per step.")] = 32,
    seed: Annotated[int, typer.Option(help="Of weights and crops.")] = 0,
    photos: Annotated[Path | None, typer.Option(help="Folder of JPEG files; the bundled ones by default.")] = None,
    out: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Train every quantizer on the same toy autoencoder: reconstruction, usage, time and memory."""
    from vistok.evaluate import bench_quantizers as module

    chosen = files.listed(kinds) or None
    result = module.run(kinds=chosen, steps=steps, batch=batch, seed=seed, photos=photos)
    module.print_table(result)
    if plot is not None:
        files.make_folders([plot])
        module.plot(result, plot)
        typer.echo(f"Wrote {plot}")
    write_json(out, result.as_dict())


@bench.command("vlm")
def bench_vlm(
    model: Annotated[Path | None, typer.Option(help="Directory of a model; random weights without it.")] = None,
    method: Annotated[str, typer.Option(help="Methods or YAML files with a setting, separated by commas.")] = "",
    keep: Annotated[str, typer.Option(help="Image tokens that stay: shares or numbers, separated by commas.")] = "",
    task: Annotated[Task, typer.Option(help="scenes: answers to questions as well; needs --model.")] = Task.speed,
    sweep: Annotated[bool, typer.Option("--sweep", help="Every budget of a curve, and the plot.")] = False,
    image_tokens: Annotated[int, typer.Option(min=4, help="Image tokens of the random model's prompt.")] = 576,
    questions: Annotated[int, typer.Option(min=1, help="Questions of --task scenes.")] = 120,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds after one warm-up.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own number by default.")] = None,
    clock: Annotated[Clock, typer.Option(help="process: for one thread on a busy machine.")] = Clock.wall,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights of --model.")] = Dtype.auto,
    out: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Prefill, decoding, memory and FLOPs of a model with and without token compression; on scenes, its answers too."""
    from vistok.cli import vlm

    result = vlm.run(
        model,
        methods=files.listed(method),
        keep=files.listed(keep),
        scenes=task is Task.scenes,
        sweep=sweep,
        image_tokens=image_tokens,
        questions=questions,
        rounds=rounds,
        threads=threads,
        clock=clock.value,
        dtype=dtype.value,
        plot=plot,
    )
    write_json(out, result)


@bench.command("vit")
def bench_vit(
    models: Annotated[
        str, typer.Option(help="Models of timm, separated by commas.")
    ] = "vit_small_patch16_224,vit_base_patch16_224",
    method: Annotated[
        str, typer.Option(help="Registered methods, separated by commas; ToMe at r = 8, 13, 16 and others by default.")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Pictures per forward.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds after one warm-up.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; processor time says most with one.")] = 1,
    selections: Annotated[
        bool, typer.Option("--selections", help="Also selections behind a CLIP-L/336 tower on five tiles.")
    ] = False,
    out: JsonFile = None,
) -> None:
    """Vision transformers with random weights, with and without reduction inside them: processor and wall time."""
    from vistok.evaluate import bench_vit as module

    settings = [{"name": name} for name in files.listed(method)] or module.SETTINGS
    result = module.run(
        files.listed(models), settings=settings, batch=batch, rounds=rounds, threads=threads, selections=selections
    )
    typer.echo(module.table(result))
    write_json(out, result.to_dict())


@bench.command("methods")
def bench_methods(
    out: Annotated[
        Path, typer.Option(help="JSON file for the result; replaced if it exists.", callback=files.writable)
    ],
    keep: Annotated[float, typer.Option(help="Share of image tokens that stay.")] = 1 / 3,
) -> None:
    """Count the FLOPs of a prompt with every method; `vistok list method --costs FILE` shows them."""
    from vistok.evaluate import bench_methods as module

    result = module.measure(keep=keep)
    for name, row in result["methods"].items():
        typer.echo(f"{name:20}" + (f"{row['flops']:.1%}" if "flops" in row else row["refused"]))
    write_json(out, result)


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a result if a file was asked for; replaced if it exists."""
    if path is not None:
        import json

        from vistok.hub import write_atomic

        files.make_folders([path])
        write_atomic(path, json.dumps(content, indent=2).encode())
        typer.echo(f"Wrote {path}")
