"""LLaVA (1.5 and what shares its class): CLIP tower, two-layer projector, any decoder."""

from __future__ import annotations

from vistok.plugins.families.base import Family
from vistok.registry import register


@register("family", "llava")
class Llava(Family):
    """One run of placeholders per image, on the square grid of the tower."""

    hosts = ("LlavaForConditionalGeneration",)
