"""What `show` needs to know about the pictures of the last prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.plugins.families.base import Block, Entry

if TYPE_CHECKING:
    from vistok.plugins.runtime import Runtime

GRIDS = ("image_grid_thw", "video_grid_thw")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Grids of the pictures of a prompt, worked out only when asked for.

    Attributes:
        features: Of every picture as the language model got them if nothing was compressed before it, else None.
        counts: Pictures of every sample.
        grids: Arguments that hold grids.
        blocks: Grids, where they are known already.
        entries: What compression in front of the language model did, if any.
    """

    features: list[Tensor] | None = None
    counts: list[int]
    grids: Mapping[str, Any]
    blocks: list[list[Block]] | None = None
    entries: list[Entry] | None = None

    @classmethod
    def of(
        cls, runtime: Runtime, outputs: Mapping[str, Any], kwargs: Mapping[str, Any], counts: list[int]
    ) -> Pictures | None:
        """Of a prompt whose features were left as they are; only the features are held on to."""
        if outputs.get("image") is None:
            return None
        features = [f.detach() for f in runtime.family.features(runtime.model, outputs["image"])]
        return cls(features=features, counts=counts, grids={name: kwargs.get(name) for name in GRIDS})

    def blocks_of(self, runtime: Runtime, i: int) -> list[Block]:
        """Grids of picture i of the batch."""
        if self.blocks is not None:
            return self.blocks[i]
        output = SimpleNamespace(pooler_output=self.features)
        return runtime.family.blocks(runtime.model, output, dict(self.grids), "image")[i]

    def fate(self, runtime: Runtime, i: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What became of the cells of picture i.

        Args:
            runtime: Of the plug-in.
            i: Number of the picture in the batch.
            kept: Places, among the features the language model got, that are left after the last cut.

        Returns:
            Token of every cell (-1 for none) and how many cells that token stands for, (h, w) each.

        Raises:
            ValueError: The picture's tokens lie on no grid, or on those of several tiles.
        """
        blocks = self.blocks_of(runtime, i)
        if len(blocks) > 2 or blocks[-1].grid is None or len(blocks[-1].grid) != 2:
            raise ValueError("Only a picture whose tokens lie on one grid (or base and mosaic) can be painted.")
        block = blocks[-1]
        assert block.grid is not None
        total = sum(b.length + len(b.newlines) for b in blocks)
        slots = torch.arange(total) if self.entries is None else self.entries[i].reduction.labels()[0].cpu()
        alive = torch.isin(slots, kept.cpu())
        slots = torch.where(alive, slots, -1)
        sizes = torch.bincount(slots.clamp_min(0)[slots >= 0], minlength=total)[slots.clamp_min(0)]
        sizes = torch.where(slots >= 0, sizes, 0)
        return slots[block.columns].view(block.grid), sizes[block.columns].view(block.grid)
