"""Pictures made smaller before the tower: what a family gives back, and where its tokens go in the prompt."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.compress.grid import centre_of, combine
from vistok.compress.method import FeatureMethod
from vistok.compress.reduction import Reduction
from vistok.plugins.families.base import Block, Entry, entry
from vistok.plugins.features import Encoded
from vistok.plugins.layout import run_lengths

if TYPE_CHECKING:
    from vistok.plugins.runtime import Runtime


def downsampled(runtime: Runtime, kwargs: dict[str, Any], masks: dict[str, Tensor]) -> Encoded:
    """Run the tower on smaller pictures; arguments and result as `features.compress`.

    Raises:
        ValueError: Pictures that are encoded already.
    """
    family, method = runtime.family, runtime.method
    assert isinstance(method, FeatureMethod)
    if any(v is not None for v in (kwargs.get("mm_encoder_outputs") or {}).values()):
        raise ValueError(
            f"{type(method).__name__} makes pictures smaller before the tower, and this prompt comes with encoded "
            "pictures. Give pixels, or use pool."
        )
    runs = {m: run_lengths(mask) for m, mask in masks.items()} if family.images_are_runs else {}
    new, entries, sizes, pictures = {}, {}, {}, []
    for modality, small in family.encode_smaller(
        runtime.model, kwargs, lambda n: method.count(n, runtime.host), runs
    ).items():
        entries[modality] = [
            place(features, blocks, grids) for features, blocks, grids in zip(small.features, small.blocks, small.grids)
        ]
        sizes[modality] = [sum(block.length + len(block.newlines) for block in blocks) for blocks in small.blocks]
        if modality == "image":
            pictures = small.blocks
        new[modality] = family.rebuilt(copy.copy(small.output), small.features)
    return new, entries, sizes, pictures


def place(features: Tensor, blocks: list[Block], grids: list[tuple[int, ...]]) -> Entry:
    """Where the tokens of a smaller picture go in the prompt of the full one.

    Token (i, j) of a small grid takes the place of the token in the middle of what it covers.

    Args:
        features: Of all small grids, each row followed by its newline where the full grid has them, (M, D).
        blocks: The full grids.
        grids: The small ones, empty where a grid has no tokens left.
    """
    total = sum(block.length + len(block.newlines) for block in blocks)
    anchors = []
    for block, small in zip(blocks, grids):
        kept = torch.zeros(total, dtype=torch.bool)
        if small:
            assert block.grid is not None
            inside = combine([centre_of(o, n) for o, n in zip(block.grid, small)], block.grid)
            kept[block.columns[inside]] = True
        if small or len(block.newlines) == 1:
            kept[block.newlines_kept(kept)] = True
        anchors.append(torch.where(kept)[0])
    index = torch.cat(anchors).to(features.device).unsqueeze(0)
    return entry(features, Reduction(index, torch.ones_like(index), total))
