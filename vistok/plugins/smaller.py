"""Pictures made smaller before the tower: what a family gives back, and where its tokens go in the prompt."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.compress.grid import cell_of, centre_of, combine
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

    Token (i, j) of a small grid takes the place of the token in the middle of what it covers, and stands for all of it.

    Args:
        features: Of all small grids, each row followed by its newline where the full grid has them, (M, D).
        blocks: The full grids.
        grids: The small ones, empty where a grid has no tokens left.
    """
    total = sum(block.length + len(block.newlines) for block in blocks)
    anchors, links = [], torch.full((total,), -1)  # column that every column went to, first by its own number
    for block, small in zip(blocks, grids):
        kept = torch.zeros(total, dtype=torch.bool)
        if math.prod(small) and small:
            assert block.grid is not None
            inside = combine([centre_of(o, n) for o, n in zip(block.grid, small)], block.grid)
            cells = combine([cell_of(o, n) for o, n in zip(block.grid, small)], small)
            kept[block.columns[inside]] = True
            links[block.columns] = block.columns[inside][cells]
        if small or len(block.newlines) == 1:
            newlines = block.newlines_kept(kept)
            kept[newlines] = True
            links[newlines] = newlines
        anchors.append(torch.where(kept)[0])
    index = torch.cat(anchors)
    slots = torch.full((total + 1,), -1)  # the last one for what went nowhere
    slots[index] = torch.arange(len(index))
    links = slots[links]
    sizes = torch.bincount(links[links >= 0], minlength=len(index))
    weights = 1 / sizes[links.clamp_min(0)].float()
    index, sizes, links, weights = (t.to(features.device) for t in (index, sizes, links, weights))
    reduction = Reduction(index[None], sizes[None], total, links.view(1, -1, 1), weights.view(1, -1, 1))
    return entry(features, reduction)
