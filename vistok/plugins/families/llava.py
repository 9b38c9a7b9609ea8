"""LLaVA (1.5 and what shares its class): CLIP tower, two-layer projector, any decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.compress.grid import fit_grid
from vistok.compress.method import TowerMethod
from vistok.compress.reduction import Reduction
from vistok.plugins.families.base import Block, Entry, Family, Smaller, entry, resized
from vistok.plugins.tower import working
from vistok.registry import register


@register("family", "llava")
class Llava(Family):
    """One run of placeholders per image, on the square grid of the tower."""

    hosts = ("LlavaForConditionalGeneration",)

    def encode_smaller(
        self, model: Any, kwargs: dict[str, Any], count: Callable[[int], int], runs: dict[str, list[int]]
    ) -> dict[str, Smaller]:
        """Resize every picture to a whole number of patches; the tower interpolates its position table."""
        pixels: Tensor = kwargs["pixel_values"]
        tower = self.tower(model)
        patch = tower.config.patch_size
        if not hasattr(tower.embeddings, "interpolate_pos_encoding"):
            raise TypeError(f"The position table of a {type(tower).__name__} cannot be interpolated. Use pool instead.")
        h, w = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        small = fit_grid((h, w), count(h * w))
        if small != (h, w):
            changed = {**kwargs, "pixel_values": resized(pixels, (small[0] * patch, small[1] * patch))}
            output = self.encode(model, changed, interpolate_pos_encoding=True)["image"]
        else:
            output = self.encode(model, kwargs)["image"]
        full = Block(columns=torch.arange(h * w), grid=(h, w))
        features = self.features(model, output)
        grids: list[list[tuple[int, ...]]] = [[small] for _ in pixels]
        return {"image": Smaller(output=output, features=features, blocks=[[full] for _ in pixels], grids=grids)}

    def encode_merged(
        self, model: Any, kwargs: dict[str, Any], method: TowerMethod
    ) -> tuple[dict[str, Any], dict[str, list[Entry]], dict[str, list[int]]]:
        """Pictures one by one, so that each merges as its own content says; under `reference` all in one batch."""
        pixels: Tensor = kwargs["pixel_values"]
        features: list[Tensor] = []
        entries: list[Entry] = []
        output: Any = None
        for batch in [pixels] if method.reference else pixels.split(1):
            with working(self.tower(model), method) as work:
                output = self.encode(model, {**kwargs, "pixel_values": batch})["image"]
            assert work.class_row is not None
            must = method.key_set(work.class_row)
            for i, found in enumerate(self.features(model, output)):
                features.append(found)
                entries.append(entry(found, _places(work.reduction, i, len(found), method), must[i]))
        sizes = [e.reduction.length for e in entries]
        output.pooler_output = features
        return {"image": output}, {"image": entries}, {"image": sizes}


def _places(merged: Reduction | None, i: int, count: int, method: TowerMethod) -> Reduction:
    """Placeholders that the features of picture i take; merged-first order has no places of its own."""
    if merged is None or method.reference:
        index = torch.arange(count).unsqueeze(0)
        return Reduction(index, torch.ones_like(index), count if merged is None else merged.length)
    assert merged.links is not None and merged.weights is not None
    one = slice(i, i + 1)
    return Reduction(merged.index[one], merged.sizes[one], merged.length, merged.links[one], merged.weights[one])
