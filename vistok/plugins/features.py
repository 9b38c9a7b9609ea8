"""Compression of encoded images, one by one: signals in, features with fewer tokens out.

One place for grids, crops and newlines, for every method and family.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.compress.crops import Crop
from vistok.compress.method import FeatureMethod
from vistok.compress.reduction import Reduction
from vistok.compress.signals import Level, Signals
from vistok.plugins.families.base import PIXELS, Block, Entry, entry, grouped
from vistok.plugins.layout import run_lengths
from vistok.plugins.reader import TowerReader

if TYPE_CHECKING:
    from vistok.plugins.runtime import Runtime


@dataclass(kw_only=True)
class Image:
    """One image and what is known of it; tensors are laid out like its features.

    Attributes:
        features: What the language model would get, (N, D), newlines included.
        blocks: Its grids.
        tower: Features in front of the projector, (N, D').
        levels: Row (N,) and keys (N, heads, d) of every block the method reads.
        text: Embeddings of its sample's text.
        class_token: The tower's class token, (1, D').
    """

    features: Tensor
    blocks: list[Block]
    tower: Tensor | None = None
    levels: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    text: Tensor | None = None
    class_token: Tensor | None = None


Encoded = tuple[dict[str, Any], dict[str, list[Entry]], dict[str, list[int]], list[list[Block]]]


def compress(runtime: Runtime, kwargs: dict[str, Any], masks: dict[str, Tensor]) -> Encoded:
    """Encode the pictures and compress their features.

    Args:
        runtime: Of the plug-in.
        kwargs: Keyword arguments of the host.
        masks: Placeholders of each modality, (B, L).

    Returns:
        Encoder outputs with fewer tokens, the images one by one, their full sizes, and the grids of the pictures.
    """
    family, method = runtime.family, runtime.method
    assert isinstance(method, FeatureMethod)
    new, entries, sizes, pictures = {}, {}, {}, []
    for modality, (output, images) in encode(runtime, kwargs, masks).items():
        if "text" in method.wanted():
            _add_text(runtime, kwargs, masks, modality, images)
        if method.reference:
            method.survey([image.levels[-1][0] for image in images if image.levels])
        entries[modality] = [compress_image(runtime, image, modality) for image in images]
        sizes[modality] = [sum(block.length + len(block.newlines) for block in image.blocks) for image in images]
        if modality == "image":
            pictures = [image.blocks for image in images]
        new[modality] = family.rebuilt(copy.copy(output), [e.features for e in entries[modality]])
        family.rebuild_extra(new[modality], [e.reduction for e in entries[modality]])
    return new, entries, sizes, pictures


def encode(runtime: Runtime, kwargs: dict[str, Any], masks: dict[str, Tensor]) -> dict[str, tuple[Any, list[Image]]]:
    """Run the tower on the pixels of each modality, with an eye on what the method wants to know.

    Raises:
        ValueError: Encoded pictures for a method that has to see the tower at work.
    """
    model, family, method = runtime.model, runtime.family, runtime.method
    assert isinstance(method, FeatureMethod)
    given = {k: v for k, v in (kwargs.get("mm_encoder_outputs") or {}).items() if v is not None}
    watches = method.at == "tower" or bool(method.wanted() & {"cls_row", "keys", "class_token"})
    if given and watches:
        raise ValueError(
            f"{type(method).__name__} reads the vision tower while it runs, and this prompt comes with encoded "
            "pictures. Give pixels, or use a method that looks at features alone, such as divprune or pool."
        )
    found = {}
    for modality, name in PIXELS.items():
        if kwargs.get(name) is None and modality not in given:
            continue
        alone = {k: v for k, v in kwargs.items() if k not in PIXELS.values() or k == name}
        output, reader = given.get(modality), TowerReader(family, model, method)
        if output is None:
            with reader:
                output = family.encode(model, alone)[modality]
        features = family.features(model, output)
        images = [Image(features=f, blocks=b) for f, b in zip(features, family.blocks(model, output, kwargs, modality))]
        if watches:
            _add_signals(runtime, reader, images, alone, modality)
        if family.images_are_runs:
            images = _joined(images, run_lengths(masks[modality]))
        found[modality] = (output, images)
    return found


def _add_signals(
    runtime: Runtime, reader: TowerReader, images: list[Image], kwargs: dict[str, Any], modality: str
) -> None:
    levels = reader.levels(kwargs, modality)
    tower = reader.tower_tokens(kwargs, modality) if reader.method.at == "tower" else None
    laid_out = [len(row[0]) for row, _ in levels if row] + ([] if tower is None else [len(tower[0])])
    if images and any(n != len(images[0].features) for n in laid_out):
        raise TypeError(
            f"The tower speaks of {laid_out[0]} tokens of the first picture and its features are "
            f"{len(images[0].features)}: {type(reader.method).__name__} needs patches alone to go to the projector. "
            'Set vision_feature_select_strategy to "default", or use a method that looks at features alone.'
        )
    for i, image in enumerate(images):
        image.levels = [(row[i], None if keys is None else keys[i]) for row, keys in levels]
        image.tower = None if tower is None else tower[i]
        if reader.class_token is not None:
            image.class_token = reader.class_token[i : i + 1]


def _add_text(
    runtime: Runtime, kwargs: dict[str, Any], masks: dict[str, Tensor], modality: str, images: list[Image]
) -> None:
    """Give every image the embeddings of its sample's text tokens."""
    ids, embeds, mask = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if embeds is None:
        embeds = runtime.model.get_input_embeddings()(ids)
    text = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
    for found in masks.values():
        text = text & ~found
    per_row: list[int] = masks[modality].sum(1).tolist()
    at = iter(images)
    for row, room in enumerate(per_row):
        while room > 0 and (image := next(at, None)) is not None:
            image.text = embeds[row, text[row]].detach()
            room -= len(image.features)


def _joined(images: list[Image], runs: list[int]) -> list[Image]:
    """Tiles of one picture (one run of placeholders) as one image of several blocks."""
    counts = grouped([len(image.features) for image in images], runs)
    whole, at = [], 0
    for tiles in counts:
        parts = images[at : at + tiles]
        at += tiles
        offsets = [0, *itertools.accumulate(len(p.features) for p in parts)]
        blocks = [b.moved(offset) for p, offset in zip(parts, offsets) for b in p.blocks]
        levels = [
            (torch.cat([row for row, _ in level]), _cat([keys for _, keys in level]))
            for level in zip(*(p.levels for p in parts))
        ]
        whole.append(
            Image(
                features=torch.cat([p.features for p in parts]),
                blocks=blocks,
                tower=_cat([p.tower for p in parts]),
                levels=levels,
            )
        )
    return whole


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [p for p in parts if p is not None]
    return torch.cat(given) if given else None


def compress_image(runtime: Runtime, image: Image, modality: str) -> Entry:
    """Compress one image part by part; a newline stays while its row holds a token."""
    method = runtime.method
    assert isinstance(method, FeatureMethod)
    total = sum(block.length for block in image.blocks)
    count = None if method.keep is None else method.count(total, runtime.host)
    if modality not in method.modalities or total == 0 or (count is not None and count >= total):
        return entry(image.features, _all(len(image.features), image.features.device))
    split = [(b, c) for b in image.blocks for c in (b.crops() if method.per_crop else [(b.columns, b.grid, None)])]
    parts = [_signals(method, image, columns, grid, crop) for _, (columns, grid, crop) in split]
    with torch.no_grad():
        inside = method.compress_image(parts, count)
        columns = [c for _, (c, _, _) in split]
        reduction = _whole(image, columns, inside, ordered=method.in_order)
    features = _outputs(runtime, image, reduction)
    if len(parts) == 1:
        own = inside[0].index.shape[1]
        features = torch.cat([method.mix(features[:own], inside[0], parts[0]), features[own:]])
    return entry(features, reduction, columns=len(image.features), fill=method.reference)


def _all(n: int, device: torch.device) -> Reduction:
    index = torch.arange(n, device=device).unsqueeze(0)
    return Reduction(index, torch.ones_like(index), n)


def _signals(
    method: FeatureMethod, image: Image, columns: Tensor, grid: tuple[int, ...] | None, crop: Crop | None
) -> Signals:
    columns = columns.to(image.features.device)
    features = image.tower if image.tower is not None else image.features
    levels = [Level(cls_row=row[columns], keys=None if keys is None else keys[columns]) for row, keys in image.levels]
    last = levels[-1] if levels else None
    return Signals(
        features=features.detach()[columns],
        grid=grid,
        cls_row=None if last is None else last.cls_row,
        keys=None if last is None else last.keys,
        levels=tuple(levels),
        text=image.text,
        crop=crop,
        class_token=None if image.class_token is None else image.class_token[0].detach(),
    )


def _whole(image: Image, columns: list[Tensor], inside: Sequence[Reduction], *, ordered: bool) -> Reduction:
    """Reductions of the parts as one of the image, newlines and class token included.

    Args:
        image: The image.
        columns: Places of the tokens of every part.
        inside: What becomes of them. A reduction one longer than its part speaks of the class token too.
        ordered: Sort the outputs by their anchors; otherwise they stay in the order the method gave.
    """
    device, n = image.features.device, len(image.features)
    length = n + (0 if image.class_token is None else 1)
    anchors, sizes, before = [], [], 0
    width = max(1 if r.links is None else r.links.shape[2] for r in inside)
    links = torch.full((length, width), -1, device=device)
    weights = torch.zeros(length, width, device=device)
    kept = torch.zeros(length, dtype=torch.bool, device=device)
    for place, reduction in zip(columns, inside):
        place = place.to(device)
        if reduction.length > len(place):
            place = torch.cat([place, place.new_tensor([n])])
        to, by = (t[0].to(device) for t in reduction.as_links())
        links[place, : to.shape[1]] = torch.where(to >= 0, to + before, -1)
        weights[place, : to.shape[1]] = by.to(weights)
        anchor = place[reduction.index[0].to(device)]
        kept[anchor] = True
        anchors.append(anchor)
        sizes.append(reduction.sizes[0].to(device))
        before += len(anchor)
    newlines = torch.cat([block.newlines_kept(kept[:n]) for block in image.blocks]).to(device)
    links[newlines, 0] = before + torch.arange(len(newlines), device=device)
    weights[newlines, 0] = 1
    anchors.append(newlines)
    sizes.append(torch.ones_like(newlines))
    return _sorted(torch.cat(anchors), torch.cat(sizes), links, weights, ordered=ordered)


def _sorted(anchors: Tensor, sizes: Tensor, links: Tensor, weights: Tensor, *, ordered: bool) -> Reduction:
    """The outputs of all parts in the order of their anchors."""
    if ordered:
        order = anchors.argsort(stable=True)
        rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        anchors, sizes = anchors[order], sizes[order]
        links = torch.where(links >= 0, rank[links.clamp_min(0)], -1)
    return Reduction(anchors.unsqueeze(0), sizes.unsqueeze(0), len(links), links.unsqueeze(0), weights.unsqueeze(0))


def _outputs(runtime: Runtime, image: Image, reduction: Reduction) -> Tensor:
    """Features of the outputs; what was merged in front of the projector is projected now."""
    method, family = runtime.method, runtime.family
    features = image.features
    if not method.merges and not method.reference:
        return features[reduction.index[0]]
    if image.tower is None or not method.merges:
        return reduction.apply(features.unsqueeze(0))[0]
    tower = image.tower if image.class_token is None else torch.cat([image.tower, image.class_token])
    index, touched = reduction.index[0], _touched(reduction, len(features))
    merged = reduction.apply(tower.unsqueeze(0))[0][touched]
    plain = features[index.clamp_max(len(features) - 1)]
    if len(touched) == 0:
        return plain
    return plain.index_put((touched,), family.project(runtime.model, merged).to(features.dtype))


def _touched(reduction: Reduction, tokens: int) -> Tensor:
    """Numbers of the outputs that are no copies of a token (newlines are): several inputs, weighed, or the class's."""
    links, weights = (t[0].flatten() for t in reduction.as_links())
    index, real = reduction.index[0], links >= 0
    parts = torch.bincount(links[real], minlength=len(index))
    odd = torch.zeros(len(index), dtype=torch.bool, device=index.device)
    odd[links[real & (weights != 1)]] = True
    return torch.where(odd | (parts != 1) | (index >= tokens))[0]
