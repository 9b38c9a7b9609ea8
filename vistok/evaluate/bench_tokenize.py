"""`vistok bench tokenize`: how much of the encoder's speed is left once pictures are read and shards are written."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import vistok
from vistok.config import create
from vistok.data.base import Dataset
from vistok.tokenize.job import Settings, encode_views, tokenize
from vistok.tokenize.reading import Part, Reader, pieces
from vistok.tokenize.views import Views
from vistok.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizeBench:
    """Result of one benchmark run; speeds are medians over rounds, in pictures (views) per second.

    Attributes:
        model: Preset that was timed (random weights).
        pictures: Views per round.
        batch: Views encoded at once.
        workers: Processes that read pictures.
        threads: CPU threads.
        device: Where the encoder ran.
        encoder: Speed of the encoder alone, on pictures in memory.
        reading: Speed of reading, cropping and mirroring alone.
        pipeline: Speed of `vistok tokenize` from files to shards.
        ratio: Median over the rounds of pipeline / encoder; 1 where reading and writing cost nothing.
        cpu_ratio: The same of processor time, encoder / pipeline: what reading and writing cost where they share the
            encoder's cores.
        waited: Share of the pipeline's time in which the encoder waited for pictures.
    """

    model: str
    pictures: int
    batch: int
    workers: int
    threads: int
    device: str
    encoder: float
    reading: float
    pipeline: float
    ratio: float
    cpu_ratio: float
    waited: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run(
    model: str = "titok_s128.in1k",
    *,
    data: dict[str, Any] | None = None,
    batch: int = 8,
    rounds: int = 3,
    workers: int = 0,
    threads: int | None = None,
    device: str = "cpu",
) -> TokenizeBench:
    """Time encoder, reader and the whole job in turn in every round, so that a machine that drifts changes all.

    Args:
        model: A tokenizer preset; weights are random.
        data: Spec of a data set of pictures; the bundled held-out ones and their mirror images by default.
        batch: Views encoded at once.
        rounds: Timed rounds after one warm-up.
        workers: Processes that read pictures; 0 for a thread.
        threads: CPU threads; torch's own number if None.
        device: Where the encoder runs.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer: Tokenizer = vistok.create("tokenizer", model).eval().to(device)
    spec = data or {"name": "photos", "split": "heldout"}
    dataset: Dataset = create("dataset", **spec)
    settings = Settings(views=Views(augment="flip"), shard_size=len(dataset))
    reader = Reader(dataset, tokenizer.preprocess, settings.views)
    wanted = pieces([0], len(dataset), len(dataset), max(1, batch // 2))
    parts = [reader[piece] for piece in wanted]
    count = sum(len(part.pictures) for part in parts) * len(settings.views)

    def whole() -> float:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            return tokenize(tokenizer, dataset, out, data=spec, settings=settings, batch=batch, workers=workers).waited

    _encode(tokenizer, parts[:1], batch)
    found: list[tuple[float, ...]] = []
    for _ in range(rounds):
        encoder, encoder_cpu, _ = _timed(lambda: _encode(tokenizer, parts, batch))
        reading, _, _ = _timed(lambda: [reader[piece] for piece in wanted])
        pipeline, pipeline_cpu, waited = _timed(whole)
        found.append(
            (count / encoder, count / reading, count / pipeline, encoder / pipeline, encoder_cpu / pipeline_cpu, waited)
        )
    medians = [statistics.median(column) for column in zip(*found)]
    names = ("encoder", "reading", "pipeline", "ratio", "cpu_ratio", "waited")
    return TokenizeBench(
        model=model,
        pictures=count,
        batch=batch,
        workers=workers,
        threads=torch.get_num_threads(),
        device=device,
        **dict(zip(names, medians)),
    )


def _encode(tokenizer: Tokenizer, parts: list[Part], batch: int) -> None:
    for part in parts:
        encode_views(tokenizer, part, batch)


def _timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds of this process, and the result of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return time.perf_counter() - wall, time.process_time() - cpu, found
