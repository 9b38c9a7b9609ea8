"""LLaVA (1.5 and what shares its class): CLIP tower, two-layer projector, any decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.compress.grid import fit_grid
from vistok.plugins.families.base import Block, Family, Patches, Smaller, resized
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

    def patches(self, model: Any, kwargs: dict[str, Any]) -> Patches:
        """Every picture is one tile."""
        pixels: Tensor = kwargs["pixel_values"]
        patch = self.tower(model).config.patch_size
        output, features, states = self.tower_states(model, kwargs, pixels)
        h, w = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        full = Block(columns=torch.arange(h * w), grid=(h, w))
        count = len(pixels)
        return Patches(
            output=output, features=features, states=states, grid=(h, w), tiles=[1] * count, blocks=[[full]] * count
        )

    def placed(self, model: Any, kwargs: dict[str, Any], patches: Patches, features: Tensor, side: int) -> Smaller:
        """One smaller grid per picture."""
        small: tuple[int, ...] = (patches.grid[0] // side, patches.grid[1] // side)
        patches.output.pooler_output = list(features)  # as the host has it
        grids = [[small] for _ in features]
        return Smaller(output=patches.output, features=list(features), blocks=patches.blocks, grids=grids)
