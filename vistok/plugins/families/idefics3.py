"""SmolVLM and Idefics3: tiles of a picture with text between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.plugins.families.base import Family
from vistok.registry import register


@register("family", "idefics3")
class Idefics3(Family):
    """An image is a *tile*: row and column markers stand between the tiles of a picture, so budgets are per tile."""

    hosts = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")

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
