"""QueCC on a host: a trained compressor that reads the question."""

from __future__ import annotations

from torch import nn

from vistok.compress.trained import TrainedMethod
from vistok.registry import register


@register("method", "quecc")
class QueCCMethod(TrainedMethod):
    """One token for every window of the tower's grid, asked by the question behind the picture (arXiv 2411.03312).

    The trained compressor takes the place of the host's projector, which does not run. Pictures of several crops are
    compressed crop by crop, and their tokens laid out like those of the crops.

    Args:
        compressor: A compressor of the name `quecc` or the folder it was saved in; see
            `vistok.compress.compressors.quecc.QueCC`. Official weights: `vistok.load` reads them.

    Example:
        >>> with vistok.attach(model, "quecc", compressor="runs/quecc_tiny/compressor"):   # doctest: +SKIP
        ...     out = model.generate(**inputs)
    """

    builder = "quecc"
    needs = frozenset({"patches", "text"})

    def __init__(self, *, compressor: str | nn.Module | None = None) -> None:
        super().__init__(compressor)
