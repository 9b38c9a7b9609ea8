"""Reduction inside the tower of a vision-language model: from the tower's tokens to placeholders of the prompt.

Blocks give full length in there, so that whatever lies between tower and language model (unpadding, newlines, pixel
shuffle, 2x2 merge, deepstack) works as ever. What became one token comes out of it as equal features, of which the
anchor's stays.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.compress.reduction import Reduction
from vistok.compress.vision import VisionMethod
from vistok.plugins.families.base import PIXELS, Block, Entry, entry, grouped
from vistok.plugins.layout import run_lengths
from vistok.plugins.tower import Tiles, working

if TYPE_CHECKING:
    from vistok.plugins.features import Encoded
    from vistok.plugins.runtime import Runtime


@dataclass(kw_only=True)
class Picture:
    """One image: features (N, D), its grids, and the tower's token behind each feature (N,), -1 at newlines."""

    features: Tensor
    blocks: list[Block]
    source: Tensor


def encode_merged(runtime: Runtime, kwargs: dict[str, Any], masks: dict[str, Tensor]) -> Encoded:
    """Encode the pictures while the method makes tokens fewer inside the tower.

    Args:
        runtime: Of the plug-in.
        kwargs: Keyword arguments of the host.
        masks: Placeholders of each modality, (B, L).

    Returns:
        Encoder outputs with fewer tokens, the images one by one, their full sizes, and the grids of the pictures.

    Raises:
        ValueError: Encoded pictures, or the published order on a host where it is undefined.
    """
    model, family, method = runtime.model, runtime.family, runtime.method
    assert isinstance(method, VisionMethod)
    if any(v is not None for v in (kwargs.get("mm_encoder_outputs") or {}).values()):
        raise ValueError(
            f"{type(method).__name__} works inside the vision tower, and this prompt comes with encoded pictures. "
            "Give pixels."
        )
    new, entries, sizes, pictures = {}, {}, {}, []
    for modality, name in PIXELS.items():
        if kwargs.get(name) is None:
            continue
        alone = {k: v for k, v in kwargs.items() if k not in PIXELS.values() or k == name}
        with working(family.tower(model), method, restore=True, side=family.joined(model)) as work:
            output = family.encode(model, alone)[modality]
        tiles: Tiles = work.tiles()
        count, n = tiles.label.shape
        sources = family.sources(model, alone, modality, (count, n), tiles.label.device)
        blocks = family.blocks(model, output, kwargs, modality)
        images = [
            Picture(features=f, blocks=b, source=s) for f, b, s in zip(family.features(model, output), blocks, sources)
        ]
        if family.images_are_runs:
            images = _joined(images, run_lengths(masks[modality]))
        entries[modality] = [_entry(image, tiles, method) for image in images]
        sizes[modality] = [len(image.features) for image in images]
        if modality == "image":
            pictures = [image.blocks for image in images]
        new[modality] = family.rebuilt(copy.copy(output), [e.features for e in entries[modality]])
        family.rebuild_extra(new[modality], [e.reduction for e in entries[modality]])
    return new, entries, sizes, pictures


def _joined(images: list[Picture], runs: list[int]) -> list[Picture]:
    """Tiles of one picture (one run of placeholders) as one image of several blocks."""
    whole, at = [], 0
    for count in grouped([len(image.features) for image in images], runs):
        blocks: list[Block] = []
        offset = 0
        for part in images[at : at + count]:
            blocks += [block.moved(offset) for block in part.blocks]
            offset += len(part.features)
        parts = images[at : at + count]
        features, source = (torch.cat(x) for x in zip(*((p.features, p.source) for p in parts)))
        whole.append(Picture(features=features, blocks=blocks, source=source))
        at += count
    return whole


def _entry(image: Picture, tiles: Tiles, method: VisionMethod) -> Entry:
    """One image after the tower: the anchors' features, in the order of their places."""
    device, n = image.features.device, len(image.features)
    source = image.source.to(device)
    real = source >= 0
    label = torch.where(real, tiles.label.flatten().to(device)[source.clamp_min(0)], -1)
    anchor = tiles.anchor.flatten().to(device)[source.clamp_min(0)] & real
    place = torch.arange(n, device=device)
    order = ((label * 2 + (~anchor).long()) * n + place).argsort()  # by output, its anchor first
    ranked = label[order]
    first = torch.ones_like(ranked, dtype=torch.bool)
    first[1:] = ranked[1:] != ranked[:-1]
    chosen = order[first & (ranked >= 0)]  # one column per output, in the order of outputs
    kept = torch.zeros(n, dtype=torch.bool, device=device)
    kept[chosen] = True
    newlines = torch.cat([block.newlines_kept(kept).to(device) for block in image.blocks])
    columns = torch.cat([chosen, newlines])
    if method.renumber:
        if len(newlines) or len(image.blocks) > 1:
            raise ValueError("reference=True: merged tokens come first there, which crops and newlines do not allow.")
    else:
        columns = columns.sort().values
    slot = torch.full((n,), -1, device=device)
    slot[columns] = place[: len(columns)]
    outputs = torch.full((int(tiles.label.max()) + 2,), -1, device=device)
    outputs[label[chosen]] = slot[chosen]
    outputs[-1] = -1
    links = torch.where(label >= 0, outputs[label], torch.where(kept | real, -1, slot))
    sizes = torch.bincount(links[links >= 0], minlength=len(columns))
    weights = torch.where(links >= 0, 1 / sizes.clamp_min(1)[links.clamp_min(0)].float(), torch.zeros(n, device=device))
    must = tiles.protect.flatten().to(device)[source[columns].clamp_min(0)] & (source[columns] >= 0)
    index = place[: len(columns)] if method.renumber else columns
    reduction = Reduction(index[None], sizes[None], n, links[None, :, None], weights[None, :, None])
    return entry(image.features[columns], reduction, must)
