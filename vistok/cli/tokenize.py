"""`vistok tokenize`: a data set to shards of tokens; `vistok bench tokenize`: what its pipeline costs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli import files
from vistok.cli.pictures import Device, Model, load
from vistok.cli.runs import bench, write_json

if TYPE_CHECKING:
    from vistok.tokenize.job import TokenizeResult


PATIENCE = timedelta(days=1)
"""Processes meet when all shards are made; on a CPU the last shard alone may take an hour."""


class Format(str, Enum):
    """Kinds of shards."""

    safetensors = "safetensors"
    webdataset = "webdataset"


class Augment(str, Enum):
    """Views of every picture."""

    none = "none"
    flip = "flip"
    ten_crop = "ten-crop"


class Codes(str, Enum):
    """Types that continuous latents are stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def tokenize(
    model: Model,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Paths, and keys of the data set as in a recipe: /data/train labels=true, or name=hf path=/data/hf.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards; an unfinished one is continued.")],
    augment: Annotated[
        Augment, typer.Option(help="Views of every picture: one, with its mirror image, or five crops with theirs.")
    ] = Augment.none,
    enlarge: Annotated[float, typer.Option(help="Ten crops are cut out of a picture this many times as large.")] = 1.1,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per picture, for nested tokenizers.")] = None,
    form: Annotated[Format, typer.Option("--format", help="Kind of the shards.")] = Format.safetensors,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples per shard; a kill costs at most one.")] = 4096,
    codes: Annotated[Codes, typer.Option(help="Type of the codes of tokenizers without ids.")] = Codes.float16,
    batch: Annotated[int, typer.Option(min=1, help="Views encoded at once.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures; 0 for a thread.")] = 0,
    device: Device = "",
) -> None:
    """Turn a data set into shards of token ids with a manifest; `data: {name: ids, path: OUT}` trains on them.

    Killed and started again it goes on with the shards that are missing, and makes damaged ones anew.

    Several processes: accelerate launch --num_processes 8 -m vistok tokenize MODEL DATA... (on CPUs: --cpu).
    """
    from vistok.train import launch

    launch.start_missing_processes()
    from vistok.config import check_component, create
    from vistok.tokenize.job import Settings
    from vistok.tokenize.views import Views

    spec = check_component("dataset", data_spec(data), "data")
    dataset = create("dataset", **spec)
    first = True
    if launch.is_one_of_several():
        state = launch.join(PATIENCE)
        device, first = str(state.device), state.is_main_process
    settings = Settings(
        views=Views(augment=augment.value, enlarge=enlarge),
        num_tokens=tokens,
        format=form.value,
        shard_size=shard_size,
        codes=codes.value,
    )
    _run(
        load(model, device),
        dataset,
        out,
        first=first,
        data=spec,
        settings=settings,
        batch=batch,
        workers=workers,
        source=model,
    )


def _run(tokenizer: Any, dataset: Any, out: Path, *, first: bool, **options: Any) -> None:
    """Do the work with a progress bar; only the first process speaks."""
    from vistok.cli.show import progress
    from vistok.distributed import world_size
    from vistok.tokenize.job import tokenize as run

    with progress("tokenize", -(-len(dataset) // world_size()), unit="samples") as advance:
        result = run(tokenizer, dataset, out, progress=advance if first else None, **options)
    if first:
        _say(result)


def _say(result: TokenizeResult) -> None:
    views = f", {result.views} views each" if result.views > 1 else ""
    if result.made:
        speed = f"{result.made / result.seconds:.1f} pictures/s"
        typer.echo(
            f"Encoded {files.pictures(result.made)} in {result.seconds:.1f} s: {speed}, "
            f"{result.waited:.0%} of the time spent waiting for them to be read."
        )
    else:
        typer.echo("Nothing is missing: every shard has its checksum.")
    samples, shards = files.counted(result.samples, "sample"), files.counted(result.shards, "shard")
    typer.echo(f"{samples}{views} in {shards}, {result.bytes} bytes -> {result.folder}")
    if result.skipped:
        name, why = next(iter(result.skipped.items()))
        typer.echo(
            f"{files.pictures(len(result.skipped))} could not be read, see skipped in manifest.json; the first, "
            f"{name}: {why}"
        )


def data_spec(words: Sequence[str]) -> dict[str, Any]:
    """The data set that arguments name: paths, and `key=value` as in the section `data` of a recipe.

    Without `name` it is told by the path: tar files are `webdataset`, a folder that `datasets` wrote is `hf`, and
    everything else `folder`.

    Raises:
        ValueError: Neither a path nor a name.
    """
    from vistok.config import from_overrides

    paths = [word for word in words if "=" not in word or Path(word).exists()]
    given = from_overrides([word.removeprefix("data.") for word in words if word not in paths])
    if paths:
        given = {"path": paths if len(paths) > 1 else paths[0], **given}
    if "path" not in given and "name" not in given:
        raise ValueError("There is no data set: give the path of pictures, or keys such as name=hf path=/data/hf.")
    found: dict[str, Any] = {"name": _kind_of(given.get("path", "")), **given}
    return found


def _kind_of(path: Any) -> str:
    """The registered data set that fits a path."""
    first = str(path[0] if isinstance(path, list) else path)
    if first.split("?")[0].endswith(".tar"):
        return "webdataset"
    marks = ("dataset_dict.json", "dataset_info.json", "state.json")
    return "hf" if any((Path(first) / mark).is_file() for mark in marks) else "folder"


@bench.command("tokenize")
def bench_tokenize(
    model: Annotated[str, typer.Option(help="A tokenizer preset; weights are random.")] = "titok_s128.in1k",
    data: Annotated[str, typer.Option(help="Folder of pictures; the bundled held-out ones by default.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Views encoded at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds after one warm-up.")] = 3,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures; 0 for a thread.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own number by default.")] = None,
    device: Device = "cpu",
    out: files.JsonFile = None,
) -> None:
    """Pictures to shards: the whole job against the encoder alone and the reading alone."""
    from vistok.cli.show import Rows
    from vistok.evaluate import bench_tokenize as module

    spec = {"name": "folder", "path": data} if data else None
    result = module.run(model, data=spec, batch=batch, rounds=rounds, workers=workers, threads=threads, device=device)
    speeds = [(name, f"{getattr(result, name):.2f}") for name in ("encoder", "reading", "pipeline")]
    Rows(("alone and together", "pictures per s>"), speeds).print()
    typer.echo(
        f"The job runs at {result.ratio:.1%} of the encoder's speed ({result.cpu_ratio:.1%} by processor time) and "
        f"waits {result.waited:.1%} of its time for pictures: {result.pictures} pictures, {result.threads} thread(s), "
        f"{result.device}."
    )
    write_json(out, result.to_dict())
