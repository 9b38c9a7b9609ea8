"""`vistok encode`, `decode`, `reconstruct`: pictures to `.vtok` files and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vistok.cli import files

if TYPE_CHECKING:
    from vistok.tokenizers.base import Tokenizer
    from vistok.tokens import Tokens

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Preset with weights, folder (also of a run), or hf-hub:org/name.")
]
Sources = Annotated[list[str], typer.Argument(metavar="FILES...", help="Files, folders, patterns.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; the first GPU if there is one by default.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")]
Caption = Annotated[str | None, typer.Option(help="Caption of the pictures, for tokenizers that read text.")]
Whole = Annotated[bool, typer.Option("--whole", help="Keep each picture's own size, for models that take any.")]
GRID_PAIRS = 16
DEFAULT = "spectral_planes_128.free"
"""The tokenizer whose weights come with the package."""
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})


def encode(
    model: Model,
    sources: Sources,
    out: Out,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per picture, for nested tokenizers.")] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            min=1,
            help="Most bytes of a picture's whole file.",
        ),
    ] = None,
    psnr: Annotated[float | None, typer.Option(help="Fewest tokens that reach this many dB, per picture.")] = None,
    caption: Caption = None,
    whole: Whole = False,
    batch: Batch = 16,
    device: Device = "",
    overwrite: Overwrite = False,
) -> None:
    """Turn pictures into .vtok files, one each."""
    from vistok.cli.show import progress
    from vistok.evaluate import lengths
    from vistok.evaluate.pixel import Psnr
    from vistok.hub import write_atomic
    from vistok.image import find_pictures, read_batches

    if sum(option is not None for option in (tokens, size, psnr)) > 1:
        raise typer.BadParameter("--tokens, --bytes and --psnr exclude each other.")
    found = files.collect(sources, find_pictures)
    places = files.targets(found, out, ".vtok", overwrite=overwrite)
    tokenizer = load(model, device, whole=whole)
    if not tokenizer.quantizer.vocab_sizes:
        raise ValueError(f"{model} has continuous latents, which a .vtok file cannot hold. Use a model with ids.")
    broken, total, count, short, shown = files.Broken(), 0, 0, 0, ""
    with progress("encode", len(found)) as advance:
        for paths, images in read_batches(list(found), tokenizer.preprocess, batch, broken=broken.reasons):
            made = tokenizer.encode(images, tokens, text=caption)
            if psnr is not None:
                made, reached = lengths.shortest(tokenizer, made, images, Psnr(), psnr)
                short += int((~reached).sum())
            singles = {path: made[i] for i, path in enumerate(paths)}
            if size is not None:
                singles = _cut(tokenizer, singles, size, broken)
            files.make_folders(places[path] for path in singles)
            for path, one in singles.items():
                data = tokenizer.to_bytes(one)
                write_atomic(places[path], data)
                total += len(data)
                shown = shown or repr(one)
            count += len(singles)
            advance(count + len(broken.reasons))
    if count:
        typer.echo(f"{files.pictures(count)} -> {out}: {total} bytes, {total / count:g} each ({shown}).")
    if count and tokenizer.prior is not None and tokenizer.coder is None:
        typer.echo("Ids are packed at full width; pip install 'vistok[codec]' makes entropy-coded, smaller files.")
    if short:
        below = f"stay{'s' * (short == 1)} below {psnr:g} dB"
        typer.echo(f"{files.pictures(short)} {below} with all {tokenizer.num_tokens} tokens.")
    broken.finish()


def decode(
    model: Model,
    sources: Sources,
    out: Out,
    caption: Caption = None,
    batch: Batch = 16,
    device: Device = "",
    overwrite: Overwrite = False,
) -> None:
    """Turn .vtok files back into pictures (PNG)."""
    from vistok.cli.show import progress
    from vistok.image import find_files, save_png, to_pictures

    found = files.collect(sources, lambda source: find_files(source, files.VTOK, ".vtok files"))
    places = files.targets(found, out, ".png", overwrite=overwrite)
    tokenizer = load(model, device)
    broken, count = files.Broken(), 0
    with progress("decode", len(found)) as advance:
        for paths, tokens in _read_tokens(list(found), tokenizer, batch, broken):
            pictures = to_pictures(tokenizer.decode(tokens, text=caption))
            files.make_folders(places[path] for path in paths)
            for path, picture in zip(paths, pictures):
                save_png(picture, places[path])
            count += len(paths)
            advance(count + len(broken.reasons))
    if count:
        typer.echo(f"{files.pictures(count)} -> {out}")
    broken.finish()


def reconstruct(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[MODEL] FILES...", help=f"Files, folders, patterns; MODEL is {DEFAULT} if none."),
    ],
    out: Out = Path("reconstructions"),
    tokens: Annotated[str, typer.Option(help="Token counts, e.g. 16,64, for nested tokenizers.")] = "",
    caption: Caption = None,
    whole: Whole = False,
    batch: Batch = 16,
    device: Device = "",
    overwrite: Overwrite = False,
) -> None:
    """Encode and decode pictures; write them (PNG) and a comparison with the originals (a ladder of --tokens)."""
    from vistok.cli.show import progress
    from vistok.evaluate.grid import count_tokens, save_grid, save_ladder
    from vistok.image import find_pictures, read_batches, save_png, to_pictures

    first = Path(words[0])
    pictures_alone = len(words) == 1 and first.is_dir() and not _is_model(first)
    only_pictures = first.suffix.lower() in PICTURES or pictures_alone
    model, sources = (DEFAULT, words) if only_pictures else (words[0], words[1:])
    if not sources:
        raise typer.BadParameter(f"There are no pictures: give files, folders or patterns after the model {model!r}.")
    found = files.collect(sources, find_pictures)
    lengths = list(dict.fromkeys(files.numbers(tokens, "--tokens")))
    counts: list[int | None] = [*lengths] or [None]
    endings = {k: "" if k is None else f".{k}" for k in counts}
    places = {k: files.targets(found, out, f"{end}.png", overwrite=overwrite) for k, end in endings.items()}
    grid = out / ("ladder.png" if len(counts) > 1 else f"comparison{endings[counts[0]]}.png")
    for targets in places.values():
        files.refuse_shared(grid, "the ladder" if len(counts) > 1 else "the comparison", targets)
    files.refuse_existing([grid], overwrite=overwrite)
    tokenizer = load(model, device, whole=whole)
    broken, done = files.Broken(), 0
    with progress("reconstruct", len(found)) as advance:
        for paths, images in read_batches(list(found), tokenizer.preprocess, batch, broken=broken.reasons):
            made = tokenizer.encode(images, text=caption)
            decoded = tokenizer.decode_lengths(made, lengths) if lengths else [tokenizer.decode(made)]
            rebuilt = {k: pictures.cpu() for k, pictures in zip(counts, decoded)}
            files.make_folders(places[counts[0]][path] for path in paths)
            for k, pictures in rebuilt.items():
                for path, picture in zip(paths, to_pictures(pictures)):
                    save_png(picture, places[k][path])
            if not done:
                shown = slice(0, GRID_PAIRS)
                names = [path.name for path in paths[shown]]
                if len(lengths) > 1:
                    steps = {count_tokens(k): rebuilt[k][shown] for k in lengths}
                    save_ladder(grid, images[shown], steps, captions=names, title=model)
                else:
                    only, title = rebuilt[counts[0]][shown], _title(model, counts[0])
                    save_grid(grid, images[shown], only, captions=names, title=title)
            done += len(paths)
            advance(done + len(broken.reasons))
    if done:
        typer.echo(f"{files.pictures(done)} -> {out}; compare them in {grid}")
    broken.finish()


def load(model: str, device: str, *, whole: bool = False) -> Tokenizer:
    """The tokenizer an argument names, on the device an option names; `whole`: pictures keep their own size."""
    import torch

    from vistok.tokenizers.load import load as load_tokenizer

    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=where).item()
    except (RuntimeError, AssertionError, NotImplementedError) as err:  # no driver, no such card, no memory behind it
        raise typer.BadParameter(f"--device: {device!r} cannot be used on this machine. Try cpu or cuda.") from err
    found: Tokenizer = _of_run(Path(model)) or load_tokenizer(model, device=where, kind="tokenizer")
    found = found.to(where)
    if whole and found.multiple is None:
        raise ValueError(f"{model} takes pictures of one size only, so --whole does not go with it.")
    if whole:
        found.preprocess = dataclasses.replace(found.preprocess, crop="none")
    return found


def _of_run(folder: Path) -> Any:
    """The tokenizer of a checkpoint, or of the newest one of a training run; None for other folders."""
    from vistok.train import checkpoint

    if (folder / checkpoint.STATE).is_file():
        return checkpoint.tokenizer_of(checkpoint.load(folder), folder)
    if _is_run(folder) and (newest := checkpoint.newest(folder)) is not None:
        return checkpoint.tokenizer_of(newest, folder)
    return None


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() and not (folder / "config.json").is_file()


def _is_model(folder: Path) -> bool:
    """Whether a folder is no folder of pictures, but a model, a run or a checkpoint."""
    return _is_run(folder) or any((folder / name).is_file() for name in ("config.json", "state.json"))


def _read_tokens(
    paths: list[Path], tokenizer: Tokenizer, batch: int, broken: files.Broken
) -> Iterator[tuple[list[Path], Tokens]]:
    """Token files in batches of one picture size, in order; broken ones are entered and left out."""
    from vistok import tokens as container

    part: list[tuple[Path, Tokens]] = []
    for path in paths:
        try:
            vocab, name = tokenizer.quantizer.vocab_sizes, tokenizer.model_id
            one = container.load(path, vocab=vocab, model_id=name, prior=tokenizer.prior)
            one = dataclasses.replace(one, grid=tokenizer.token_grid(one.size or tokenizer.preprocess.size))
            tokenizer.check_tokens(one)
        except (OSError, ValueError, ImportError) as err:
            broken.reasons[path] = str(err)
            continue
        if part and (len(part) == batch or _batch_key(part[0][1]) != _batch_key(one)):
            yield [p for p, _ in part], container.stack([t for _, t in part])
            part = []
        part.append((path, one))
    if part:
        yield [p for p, _ in part], container.stack([t for _, t in part])


def _cut(tokenizer: Tokenizer, tokens: dict[Path, Tokens], size: int, broken: files.Broken) -> dict[Path, Tokens]:
    """Tokens of pictures, cut so that each coded file takes at most `size` bytes; entered as broken where none do."""
    from vistok.evaluate.lengths import fitting

    found = {}
    for path, one in tokens.items():
        try:
            found[path] = fitting(tokenizer, one, size)
        except ValueError as err:
            broken.reasons[path] = str(err)
    return found


def _batch_key(tokens: Tokens) -> tuple[object, ...]:
    """What the tokens of one batch share."""
    return tokens.size, tokens.text is None


def _title(model: str, tokens: int | None) -> str:
    from vistok.evaluate.grid import count_tokens

    return model if tokens is None else f"{model}, {count_tokens(tokens)}"
