"""One evaluation at several token counts of the same tokens: figures that should rise, and the ladder to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.config import create
from vistok.evaluate.grid import count_tokens, ladder
from vistok.evaluate.report import Table
from vistok.image import read_batches

SHOWN = 8


@dataclass(frozen=True)
class Rungs:
    """What several lengths give.

    Attributes:
        figures: Token count -> metric name -> value over all pictures.
        png: The ladder of the first pictures.
    """

    figures: dict[int, dict[str, float]]
    png: bytes

    def table(self) -> Table:
        """The figures, a row per count."""
        names = list(next(iter(self.figures.values())))
        rows = [(count, *(round(values[n], 4) for n in names)) for count, values in self.figures.items()]
        return Table(title="Quality by number of tokens", columns=("tokens", *names), rows=rows)


@torch.no_grad()
def climb(
    tokenizer: Any, pictures: Sequence[Path], counts: Sequence[int], metrics: Sequence[str], *, batch: int, title: str
) -> Rungs:
    """Encode once, decode at every count, measure.

    Args:
        tokenizer: A nested tokenizer, in eval mode.
        pictures: Picture files; those that cannot be read are passed over.
        counts: Token counts.
        metrics: Registered metrics.
        batch: Pictures at once.
        title: Heading of the ladder.

    Raises:
        ValueError: A count that the tokenizer does not have, or no picture that can be read.
    """
    found = {k: {n: create("metric", n).to(tokenizer.device) for n in metrics} for k in counts}
    shown: tuple[list[Path], Tensor, dict[str, Tensor]] | None = None
    for files, images in read_batches(pictures, tokenizer.preprocess, batch, broken={}):
        originals = images.to(tokenizer.device)
        rebuilt = tokenizer.decode_lengths(tokenizer.encode(originals), counts)
        for k, decoded in zip(counts, rebuilt):
            for metric in found[k].values():
                metric.update(decoded, originals)
        if shown is None:
            steps = {count_tokens(k): decoded[:SHOWN].cpu() for k, decoded in zip(counts, rebuilt)}
            shown = files[:SHOWN], images[:SHOWN], steps
    if shown is None:
        raise ValueError("There is no picture to decode at several lengths.")
    stream = io.BytesIO()
    files, originals, steps = shown
    ladder(originals, steps, captions=[f.name for f in files], title=title).save(stream, "PNG")
    return Rungs({k: {n: m.compute() for n, m in row.items()} for k, row in found.items()}, stream.getvalue())
