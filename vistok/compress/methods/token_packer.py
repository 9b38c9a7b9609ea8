"""TokenPacker on a host: a trained compressor that serves every question."""

from __future__ import annotations

from torch import nn

from vistok.compress.trained import TrainedMethod
from vistok.registry import register


@register("method", "token_packer")
class TokenPackerMethod(TrainedMethod):
    """One token for every window of the tower's grid (arXiv 2407.02392, IJCV 2025).

    The trained compressor takes the place of the host's projector, which does not run. Pictures of several crops are
    compressed crop by crop, and their tokens laid out like those of the crops.

    Args:
        compressor: A compressor of the name `token_packer` or the folder it was saved in; see
            `vistok.compress.compressors.token_packer.TokenPacker`. Official weights: `vistok.load` reads them.
    """

    builder = "token_packer"

    def __init__(self, *, compressor: str | nn.Module | None = None) -> None:
        super().__init__(compressor)
