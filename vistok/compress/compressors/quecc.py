"""QueCC, conditioned on the question, and its official checkpoints (locuslab/llava-token-compression)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vistok import hub
from vistok.compress.compressors.base import Question, TrainedCompressor, own_keys
from vistok.compress.resample import LEVELS, QueCCCompressor
from vistok.compress.resample_official import QUECC
from vistok.registry import register


@register("compressor", "quecc")
class QueCC(TrainedCompressor):
    """QueCC with its projector (arXiv 2411.03312): one token for every window of the tower's grid, asked by the prompt.

    The question of a picture is the text behind it, up to the first answer where labels tell (so nothing is given
    away in training). A second question in the same dialogue needs a new prompt with the picture in it: tokens made for
    the first question do not know the second.

    Args:
        dim: Width of the tower, C.
        out_dim: Width of the language model, D.
        levels: Hidden states for keys and values; published: 12, 16, 22, 23 of CLIP-L's 24 blocks.
        levels_dim: Their widths together; len(levels) * dim if None.
        grid: Rows and columns of tokens of the pictures it is made for, multiples of `window`.
        window: Side of a window; published: 4 of 24 (36 tokens) to 24 (one token).
        text_dim: Width of the question's vector, D; None reads no question, so the tokens serve every one.
        question: `hidden`, the language model's last hidden state at the last token of the question, which runs alone
            (published; one more pass over the question), or `embeddings`, the mean of its words' embeddings (free).
        skip: Tokens of the chat template between picture and question, and behind the question, that are not read.
            Published code reads the question alone; 0 and 0 read whatever stands behind the picture.
        num_heads: Attention heads.
        renumber: Positions are counted anew, as published.

    Example:
        >>> compressor = vistok.load("runs/quecc_tiny/compressor")          # doctest: +SKIP
        >>> plugin = vistok.attach(model, "quecc", compressor=compressor)   # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        dim: int,
        out_dim: int,
        levels: Sequence[int] = LEVELS,
        levels_dim: int | None = None,
        grid: tuple[int, int] = (24, 24),
        window: int = 4,
        text_dim: int | None = None,
        question: Question = "hidden",
        skip: tuple[int, int] = (0, 0),
        num_heads: int = 8,
        renumber: bool = True,
    ) -> None:
        width = levels_dim or len(levels) * dim
        if min(skip) < 0:
            raise ValueError(f"skip={list(skip)}: numbers of tokens, 0 or more.")
        super().__init__(
            QueCCCompressor(dim=dim, levels_dim=width, text_dim=text_dim, window=window, num_heads=num_heads),
            dim=dim,
            out_dim=out_dim,
            levels=levels,
            levels_dim=width,
            grid=grid,
            renumber=renumber,
        )
        self.question, self.skip = question, (skip[0], skip[1])


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """A projector of which element 0 is QueCC; the stage-1 file of the project, or a whole model."""
    return any(key.endswith("mm_projector.0.q_downsample.weight") for key in tensors)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> hub.Converted:
    """All sizes come from the tensors; eight heads and four levels are fixed in the official code."""
    named = own_keys(tensors, QUECC)
    dim, levels_dim = named["network.key.0.weight"].shape
    text = named.get("network.text.0.weight")
    ours = {
        "dim": dim,
        "levels_dim": levels_dim,
        "out_dim": named["projector.2.weight"].shape[0],
        "window": named["network.downsample.weight"].shape[-1],
        "text_dim": None if text is None else text.shape[1],
    }
    return "quecc", ours, named


hub.FORMATS.append(hub.Format("QueCC (locuslab/llava-token-compression)", recognises, convert, kind="compressor"))
