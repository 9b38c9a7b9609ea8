"""LLaVA (1.5 and what shares its class): CLIP tower, two-layer projector, any decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vistok.compress.grid import fit_grid
from vistok.plugins.families.base import Block, Family, square
from vistok.registry import register


@register("family", "llava")
class Llava(Family):
    """One run of placeholders per image, on the square grid of the tower."""

    hosts = ("LlavaForConditionalGeneration",)

    def encode_smaller(
        self, model: Any, kwargs: dict[str, Any], quota: Callable[[Block], int]
    ) -> tuple[dict[str, Any], dict[str, list[list[Block]]]]:
        """Resize every picture to a whole number of patches; the tower interpolates its position table."""
        pixels: Tensor = kwargs["pixel_values"]
        tower = self.tower(model)
        patch = tower.config.patch_size
        if not hasattr(tower.embeddings, "interpolate_pos_encoding"):
            raise TypeError(f"The position table of a {type(tower).__name__} cannot be interpolated. Use pool instead.")
        full = square(pixels.shape[-2] // patch * (pixels.shape[-1] // patch))
        blocks = {"image": [[full] for _ in pixels]}
        small = fit_grid(full.grid or (1, full.length), quota(full))
        if small == full.grid:
            return self.encode(model, kwargs), blocks
        size = (small[0] * patch, small[1] * patch)
        resized = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
        return self.encode(model, {**kwargs, "pixel_values": resized}, interpolate_pos_encoding=True), blocks
