"""TokenPacker, without text, and its official checkpoints (CircleRadon/TokenPacker)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vistok import hub
from vistok.compress.compressors.base import TrainedCompressor, own_keys
from vistok.compress.resample import LEVELS, TokenPackerCompressor
from vistok.compress.resample_official import TOKENPACKER
from vistok.registry import register


@register("compressor", "token_packer")
class TokenPacker(TrainedCompressor):
    """TokenPacker with its projector (arXiv 2407.02392): one token for every window, the same for every question.

    Args:
        dim: Width of the tower, C.
        out_dim: Width of the language model, D.
        levels: Hidden states for keys and values; published: 12, 16, 22, 23 of CLIP-L's 24 blocks.
        levels_dim: Their widths together; len(levels) * dim if None.
        grid: Rows and columns of tokens of the pictures it is made for, multiples of `window`.
        window: Scale factor; published: 2, 3 and 4 of 24 (144, 64 and 36 tokens).
        num_heads: Attention heads.
        renumber: Positions are counted anew, as published.

    Example:
        >>> plugin = vistok.attach(model, "token_packer", compressor="runs/packer/compressor")   # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        dim: int,
        out_dim: int,
        levels: Sequence[int] = LEVELS,
        levels_dim: int | None = None,
        grid: tuple[int, int] = (24, 24),
        window: int = 2,
        num_heads: int = 8,
        renumber: bool = True,
    ) -> None:
        width = levels_dim or len(levels) * dim
        super().__init__(
            TokenPackerCompressor(dim=dim, levels_dim=width, window=window, num_heads=num_heads),
            dim=dim,
            out_dim=out_dim,
            levels=levels,
            levels_dim=width,
            grid=grid,
            renumber=renumber,
        )


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """A projector with TokenPacker's queries; the stage-1 file of the project, or a whole model."""
    return any(key.endswith("mm_projector.q_proj_1.weight") for key in tensors)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> hub.Converted:
    """Sizes come from the tensors, the scale factor from the configuration: no tensor depends on it.

    Raises:
        LoadError: A configuration without `scale_factor`, or none.
    """
    window = config.get("scale_factor")
    if not isinstance(window, int):
        raise hub.LoadError(
            "TokenPacker's weights do not tell the scale factor (2, 3 or 4). Put the config.json of their model beside "
            "them, or give config=, a file with scale_factor."
        )
    named = own_keys(tensors, TOKENPACKER)
    dim, levels_dim = named["network.key.0.weight"].shape
    out_dim = named["projector.2.weight"].shape[0]
    return "token_packer", {"dim": dim, "levels_dim": levels_dim, "out_dim": out_dim, "window": window}, named


hub.FORMATS.append(hub.Format("TokenPacker (CircleRadon/TokenPacker)", recognises, convert, kind="compressor"))
