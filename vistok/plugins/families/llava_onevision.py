"""LLaVA-OneVision: pictures as in LLaVA-NeXT, clips as pooled frames with one closing newline."""

from __future__ import annotations

import math
from typing import Any

import torch

from vistok.plugins.families.base import Block, Family
from vistok.plugins.families.llava_next import anyres_blocks
from vistok.registry import register


@register("family", "llava_onevision")
class LlavaOnevision(Family):
    """SigLIP tower; an image is a picture with all its crops, or a clip."""

    hosts = ("LlavaOnevisionForConditionalGeneration",)

    def blocks(self, model: Any, output: Any, kwargs: dict[str, Any], modality: str) -> list[list[Block]]:
        """Grids of every picture or clip."""
        base = self.base(model)
        if modality == "image":
            return [anyres_blocks(f, getattr(base, "image_newline", None)) for f in self.features(model, output)]
        vision = model.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        found = []
        for clip in self.features(model, output):
            n = len(clip) - 1
            found.append([Block(columns=torch.arange(n), grid=(n // side**2, side, side), newlines=torch.tensor([n]))])
        return found
