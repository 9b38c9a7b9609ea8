"""The job: a data set becomes shards of tokens, by any number of processes, and goes on where it was stopped.

A shard holds the samples of a fixed range of the data set. One process makes it, in batches that start with the shard,
so its bytes depend neither on the number of processes nor on interruptions; it appears under its name all at once, and
only then is it noted as complete. What is not noted is made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vistok.config import plain
from vistok.data import manifest
from vistok.data.base import Dataset, TokenDataset, fingerprint
from vistok.data.manifest import ShardFacts
from vistok.data.token_shards import CODE_TYPES, ENDINGS, Layout, Rows, to_bytes
from vistok.distributed import all_objects, rank, world_size
from vistok.hub import write_atomic
from vistok.tokenize.reading import Part, Reader, ahead, pieces
from vistok.tokenize.views import Views
from vistok.tokenizers.base import Tokenizer
from vistok.tokens import Tokens, stack


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides, with tokenizer and data set, what is in the shards.

    Attributes:
        views: Crops and mirror images of every picture.
        num_tokens: Tokens to keep of each picture (nested tokenizers); None for all.
        format: `safetensors` or `webdataset`.
        shard_size: Samples of the data set per shard; a kill costs at most one shard per process.
        codes: Type that continuous latents are stored in.

    Raises:
        ValueError: An unknown format or type, or an empty shard.
    """

    views: Views = field(default_factory=Views)
    num_tokens: int | None = None
    format: str = "safetensors"
    shard_size: int = 4096
    codes: str = "float16"

    def __post_init__(self) -> None:
        for what, value, known in (("format", self.format, ENDINGS), ("type of codes", self.codes, CODE_TYPES)):
            if value not in known:
                raise ValueError(f"The {what} is one of {', '.join(known)}, got {value!r}.")
        if self.shard_size < 1:
            raise ValueError(f"A shard holds at least one sample, got {self.shard_size}.")
        if self.format == "webdataset" and self.codes == "bfloat16":
            raise ValueError("A WebDataset shard holds NumPy arrays, which have no bfloat16. Use float16 or float32.")


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What a job did.

    Attributes:
        folder: Where the shards are.
        samples: Samples in all shards.
        views: Views of each.
        shards: Number of shards.
        bytes: Size of all shards.
        skipped: Name of a sample that could not be read -> why; over all shards.
        made: Views encoded by this call, over all processes.
        seconds: Time of the slowest process, reading, encoding and writing.
        waited: Share of that time in which the encoders waited for pictures, mean over processes.
    """

    folder: Path
    samples: int
    views: int
    shards: int
    bytes: int
    skipped: dict[str, str]
    made: int
    seconds: float
    waited: float


def tokenize(
    tokenizer: Tokenizer,
    dataset: Dataset,
    out: str | Path,
    *,
    data: Mapping[str, Any],
    settings: Settings | None = None,
    batch: int = 32,
    workers: int = 0,
    source: str = "",
    progress: Callable[[int], None] | None = None,
) -> TokenizeResult:
    """Turn a data set into shards of tokens in a folder, or continue.

    Where torch.distributed is initialised, every process has to call it with the same arguments.

    Args:
        tokenizer: The model, on the device that is to work.
        dataset: Pictures.
        out: Folder for `manifest.json` and the shards.
        data: What the data set was built from, for the manifest.
        settings: Views, format and so on.
        batch: Views at once; it may differ between a run and its continuation.
        workers: Processes that read pictures, for each process that encodes; 0 for a thread.
        source: What the user called the model.
        progress: Called with the number of samples done in this process.

    Raises:
        ManifestError: The folder holds tokens of another tokenizer, data set or setting.
        ValueError: The tokenizer keeps each picture's own size, or no picture could be read.
        OSError: Nothing can be written.

    Example:
        >>> photos = vistok.create("dataset", "photos")
        >>> tokenize(vistok.load("spectral_planes_128.free"), photos, "ids", data={"name": "photos"}).samples
        34
    """
    settings, folder = settings or Settings(), Path(out)
    if isinstance(dataset, TokenDataset):
        raise ValueError(f"The data set {data.get('name')!r} holds tokens already; give one of pictures.")
    if tokenizer.preprocess.crop == "none":
        raise ValueError(
            "This tokenizer keeps each picture's own size, and shards hold tokens of pictures of one size. Set crop to "
            "center in its preprocessing, or write one file per picture with vistok encode --whole."
        )
    tokenizer.eval()
    if settings.num_tokens is not None:
        tokenizer.check_count(settings.num_tokens)
    identity = identity_of(tokenizer, dataset, data, settings, source)
    done: set[int] = on_first(lambda: manifest.begin(folder, identity))
    total = -(-len(dataset) // settings.shard_size)
    missing = [number for number in range(total) if number not in done]
    work = _Work(tokenizer, dataset, folder, settings, batch)
    problem: Exception | None = None
    try:
        work.run(missing[rank() :: world_size()], workers, progress)
    except Exception as err:  # the others wait below: they hear of it before it is raised
        problem = err
    agree(problem)
    counts = all_objects((work.made, work.seconds, work.waited))
    shards: list[ShardFacts] = on_first(lambda: finish(folder, identity, total, batch, changed=bool(missing)))
    seconds = max(s for _, s, _ in counts)
    return TokenizeResult(
        folder=folder,
        samples=sum(shard.samples for shard in shards),
        views=len(settings.views),
        shards=sum(bool(shard.file) for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        skipped={name: why for shard in shards for name, why in shard.skipped.items()},
        made=sum(made for made, *_ in counts),
        seconds=seconds,
        waited=sum(w / max(s, 1e-9) for _, s, w in counts) / len(counts),
    )


def identity_of(
    tokenizer: Tokenizer, dataset: Dataset, data: Mapping[str, Any], settings: Settings, source: str = ""
) -> dict[str, Any]:
    """What decides the content of all shards; a folder belongs to one identity."""
    continuous = not tokenizer.quantizer.vocab_sizes
    return {
        "tokenizer": {
            "name": tokenizer.registry_name,
            "source": source,
            "model_id": tokenizer.model_id,
            "config": plain(tokenizer.config),
            "num_tokens": settings.num_tokens or tokenizer.num_tokens,
            "nested": tokenizer.nested,
        },
        "preprocess": plain(tokenizer.preprocess),
        "data": {
            "samples": len(dataset),
            "fingerprint": fingerprint(dataset),
            "classes": list(getattr(dataset, "classes", [])),
            "spec": plain(dict(data)),
        },
        "views": settings.views.facts(),
        "shards": {"format": settings.format, "samples": settings.shard_size},
        "codes": settings.codes if continuous else None,
    }


class _Work:
    """One process's shards."""

    def __init__(self, tokenizer: Tokenizer, dataset: Dataset, folder: Path, settings: Settings, batch: int) -> None:
        self.tokenizer, self.dataset, self.folder, self.settings = tokenizer, dataset, folder, settings
        self.batch = batch
        self.made, self.seconds, self.waited = 0, 0.0, 0.0

    def run(self, shards: list[int], workers: int, progress: Callable[[int], None] | None) -> None:
        """Make the shards of these numbers, in order."""
        began, done = time.perf_counter(), 0
        views = self.settings.views
        per_piece = max(1, self.batch // len(views))
        wanted = pieces(shards, len(self.dataset), self.settings.shard_size, per_piece)
        reader = Reader(self.dataset, self.tokenizer.preprocess, views)
        parts: list[Part] = []
        made: list[Tokens] = []
        with ahead(reader, wanted, workers=workers) as coming:
            for piece in wanted:
                start = time.perf_counter()
                part = next(coming)
                self.waited += time.perf_counter() - start
                parts.append(Part(part.piece, part.pictures[:0], *_without_pictures(part)))
                made += encode_views(self.tokenizer, part, self.batch, self.settings.num_tokens)
                self.made += len(part.keys) * len(views)
                done += piece.stop - piece.first
                if piece.last:
                    self._write(piece.shard, parts, made)
                    parts, made = [], []
                if progress is not None:
                    progress(done)
        self.seconds = time.perf_counter() - began

    def _write(self, number: int, parts: list[Part], made: list[Tokens]) -> None:
        """Write a shard, then the note that it is complete."""
        skipped = {name: why for part in parts for name, why in part.skipped.items()}
        facts = ShardFacts(number=number, file="", samples=0, skipped=skipped)
        if made:
            tokens, views = stack([_kept(t) for t in made]), self.settings.views
            layout = Layout.of(tokens, views=len(views), codes=self.settings.codes, text=tokens.text is not None)
            rows = _rows(parts, layout.stored(tokens), tokens.lengths, len(views))
            data = to_bytes(rows, layout, self.settings.format)
            name = manifest.shard_name(number, self.settings.format)
            write_atomic(self.folder / name, data)
            digest = manifest.digest(data)
            facts = ShardFacts(
                number=number,
                file=name,
                samples=len(rows),
                bytes=len(data),
                sha256=digest,
                skipped=skipped,
                layout=layout,
            )
        manifest.note(self.folder, facts)


def encode_views(tokenizer: Tokenizer, part: Part, batch: int, num_tokens: int | None = None) -> list[Tokens]:
    """Tokens of a part's views, one after the other, in batches of at most `batch`, on the CPU."""
    pictures = part.pictures.flatten(0, 1)  # (n * V, H, W, 3)
    text = [caption for caption in part.text for _ in range(part.pictures.shape[1])]
    reads_text = "text" in tokenizer.options and bool(text) and text[0] is not None
    found = []
    for start in range(0, len(pictures), batch):
        rows = slice(start, start + batch)
        images = pictures[rows].to(tokenizer.device).permute(0, 3, 1, 2).contiguous().float().div_(255)
        captions = {"text": text[rows]} if reads_text else {}
        found.append(tokenizer.encode(images, num_tokens, **captions).to("cpu"))
    return found


def _kept(tokens: Tokens) -> Tokens:
    """Ids alone where there are ids."""
    return Tokens(
        ids=tokens.ids,
        codes=tokens.codes if tokens.ids is None else None,
        grid=tokens.grid,
        lengths=tokens.lengths,
        vocab=tokens.vocab,
        size=tokens.size,
        text=tokens.text,
    )


def _without_pictures(part: Part) -> tuple[Any, ...]:
    return part.index, part.keys, part.text, part.labels, part.skipped


def _rows(parts: list[Part], values: torch.Tensor, lengths: torch.Tensor, views: int) -> Rows:
    """The content of a shard from what was read and what was encoded."""
    labels = [label for part in parts for label in part.labels]
    text = [caption for part in parts for caption in part.text]
    return Rows(
        values=values.unflatten(0, (-1, views)),
        lengths=lengths.unflatten(0, (-1, views)),
        keys=tuple(key for part in parts for key in part.keys),
        index=torch.tensor([index for part in parts for index in part.index]),
        labels=None if labels[0] is None else torch.tensor([-1 if n is None else n for n in labels]),
        text=None if text[0] is None else tuple(t or "" for t in text),
    )


def finish(folder: Path, identity: Mapping[str, Any], total: int, batch: int, *, changed: bool) -> list[ShardFacts]:
    """Write the manifest of a complete folder; a complete one is left as it is if nothing changed.

    Raises:
        ManifestError: A shard is not there.
        ValueError: No picture could be read at all.
    """
    shards = manifest.noted(folder)
    absent = [manifest.shard_name(n, identity["shards"]["format"]) for n in range(total) if n not in shards]
    if absent:
        raise manifest.ManifestError(
            f"{folder} lacks {', '.join(absent[:3])}. The same vistok tokenize command goes on."
        )
    if not any(shard.samples for shard in shards.values()):
        name, why = next(iter(next(s.skipped for s in shards.values() if s.skipped).items()))
        raise ValueError(f"None of the {identity['data']['samples']} pictures can be read. The first, {name}: {why}")
    if changed or not manifest.read(folder)["complete"]:
        manifest.write(folder, identity, shards.values(), complete=True, batch=batch)
    return list(shards.values())


def on_first(call: Callable[[], Any]) -> Any:
    """The result of a call in the first process, in all of them; where it fails, it fails in all."""
    found: Any = None
    problem: Exception | None = None
    if rank() == 0:
        try:
            found = call()
        except Exception as err:  # raised by `agree`, after the others have heard of it
            problem = err
    agree(problem)
    return all_objects(found)[0]


def agree(problem: Exception | None) -> None:
    """Raise the problem of one process in every process.

    Raises:
        RuntimeError: Another process has one.
    """
    said = [text for text in all_objects(None if problem is None else str(problem)) if text is not None]
    if problem is not None:
        raise problem
    if said:
        raise RuntimeError(f"Another process failed: {said[0]}")
