"""InternVL: square tiles, four patches to a token; the tiles of a picture follow each other without a break."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.plugins.families.base import Family, Smaller, grouped, resized, square
from vistok.registry import register


def shuffled_means(patches: Tensor, factor: int) -> Tensor:
    """Means over the factor x factor patches that pixel shuffle makes one token of, (tiles, P, C) -> (tiles, n, C)."""
    side = math.isqrt(patches.shape[1])
    cells = patches.unflatten(1, (side // factor, factor, side // factor, factor))
    found: Tensor = cells.mean((2, 4)).flatten(1, 2)
    return found


@register("family", "internvl")
class InternVL(Family):
    """An image is an uninterrupted run of placeholders, whatever its number of tiles."""

    hosts = ("InternVLForConditionalGeneration",)
    images_are_runs = True
    withheld: ClassVar[dict[str, str]] = {
        "crops": "its prompts do not say how the tiles of a picture lie",
        "class_token": "its tower's class token never reaches the projector, which takes four patches at a time",
        "patches": "its projector takes four at a time",
    }

    def attentions(self, model: Any) -> list[Any]:
        """Attention of every block."""
        return [layer.attention for layer in self.tower(model).encoder.layer]

    def factor(self, model: Any) -> int:
        """Side of the patches that become one token."""
        sides = 1 / model.config.downsample_ratio
        return int(sides + 0.5)

    def joined(self, model: Any) -> int:
        """Patches of a pixel shuffle."""
        return self.factor(model)

    def pooled(self, model: Any, patches: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Means over the patches of a token."""
        return shuffled_means(patches, self.factor(model))

    def encode_smaller(
        self, model: Any, kwargs: dict[str, Any], count: Callable[[int], int], runs: dict[str, list[int]]
    ) -> dict[str, Smaller]:
        """Every tile of a picture on a smaller square; where that is not enough the last tiles alone (the overview)."""
        pixels: Tensor = kwargs["pixel_values"]
        factor, patch = self.factor(model), model.config.vision_config.patch_size[0]
        side = pixels.shape[-1] // patch // factor
        plan: list[tuple[int, int, int]] = []  # first tile used, tiles, side of each
        at, blocks, grids = 0, [], []
        for tiles in grouped([side**2] * len(pixels), runs["image"]):
            allowed = count(tiles * side**2)
            used = min(tiles, allowed)
            small = min(side, math.isqrt(allowed // used))
            plan.append((at + tiles - used, used, small))
            blocks.append([square(side**2, i * side**2) for i in range(tiles)])
            empty: list[tuple[int, ...]] = [()] * (tiles - used)
            grids.append(empty + [(small, small)] * used)
            at += tiles
        features: list[Tensor] = [pixels] * len(plan)
        output: Any = None
        for small in sorted({s for _, _, s in plan}):
            mine = [i for i, (_, _, s) in enumerate(plan) if s == small]
            given = torch.cat([pixels[plan[i][0] : plan[i][0] + plan[i][1]] for i in mine])
            if small != side:
                given = resized(given, (small * factor * patch, small * factor * patch))
            output = self.encode(model, {**kwargs, "pixel_values": given})["image"]
            for i, found in zip(mine, output.pooler_output.split([plan[i][1] for i in mine])):
                features[i] = found.flatten(0, 1)
        return {"image": Smaller(output=output, features=features, blocks=blocks, grids=grids)}
