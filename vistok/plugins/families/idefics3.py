"""SmolVLM and Idefics3: tiles of a picture with text between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.plugins.families.base import Family, Smaller, resized, square
from vistok.plugins.families.internvl import shuffled_means
from vistok.registry import register


@register("family", "idefics3")
class Idefics3(Family):
    """An image is a *tile*: row and column markers stand between the tiles of a picture, so budgets are per tile."""

    hosts = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")

    withheld: ClassVar[dict[str, str]] = {
        "crops": "every tile is an image of its own, with text between the tiles",
        "class_token": "its tower has none",
        "patches": "its projector takes several at a time",
    }

    def text_model(self, model: Any) -> Any:
        """The decoder stack."""
        return model.base_model.text_model

    def tower(self, model: Any) -> Any:
        """The vision module."""
        return model.base_model.vision_model

    def features(self, model: Any, output: Any) -> list[Tensor]:
        """The tower's features come per sample and are cut into tiles; compressed ones are tiles already."""
        length = int(model.base_model.image_seq_len)
        return [tile for row in output.pooler_output if len(row) for tile in torch.split(row, length)]

    def projector(self, model: Any) -> Any:
        """The connector behind its pixel shuffle."""
        return model.base_model.connector.modality_projection

    def joined(self, model: Any) -> int:
        """Patches of a pixel shuffle."""
        return int(model.config.scale_factor)

    def pooled(self, model: Any, patches: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Means over the patches of a token."""
        return shuffled_means(patches, int(model.config.scale_factor))

    def encode_smaller(
        self, model: Any, kwargs: dict[str, Any], count: Callable[[int], int], runs: dict[str, list[int]]
    ) -> dict[str, Smaller]:
        """Every tile on a smaller square; the tower places its positions by fractions of the tile."""
        pixels: Tensor = kwargs["pixel_values"]
        side = math.isqrt(int(model.base_model.image_seq_len))
        small = math.isqrt(count(side**2))
        changed = dict(kwargs)
        if small != side:
            size = small * int(model.config.scale_factor) * int(model.config.vision_config.patch_size)
            changed["pixel_values"] = resized(pixels, (size, size))
            mask = kwargs.get("pixel_attention_mask")
            if mask is not None:
                changed["pixel_attention_mask"] = F.interpolate(mask.float(), (size, size)).to(mask.dtype)
        output = self.encode(model, changed)["image"]
        tiles = [tile for row in output.pooler_output if len(row) for tile in torch.split(row, small**2)]
        grids: list[list[tuple[int, ...]]] = [[(small, small)] for _ in tiles]
        blocks = [[square(side**2)] for _ in tiles]
        return {"image": Smaller(output=output, features=tiles, blocks=blocks, grids=grids)}
