"""InternVL: square tiles, four patches to a token; the tiles of a picture follow each other without a break."""

from __future__ import annotations

from vistok.plugins.families.base import Family
from vistok.registry import register


@register("family", "internvl")
class InternVL(Family):
    """An image is an uninterrupted run of placeholders, whatever its number of tiles."""

    hosts = ("InternVLForConditionalGeneration",)
    images_are_runs = True
