"""The runtime in towers that run all pictures as one sequence: every frame for itself, frames of one size together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistok.compress.vision import VisionMethod
from vistok.plugins.families.encoder import Encoder
from vistok.plugins.families.qwen_vit import QwenViT, window_order
from vistok.plugins.handle import Handle
from vistok.plugins.tower import Pass, Tiles, TowerRuntime, tiles_of


@dataclass(kw_only=True)
class Frames:
    """Frames of one size.

    Attributes:
        work: Their forward.
        where: Place of every patch in the sequence, (frames, T).
    """

    work: Pass
    where: Tensor


class PackedRuntime(TowerRuntime):
    """As `TowerRuntime`, on a sequence (L, D) that holds all frames; blocks always give full length.

    Args:
        encoder: What is where in the tower.
        tower: The tower.
        method: What to do.
    """

    def __init__(self, encoder: Encoder, tower: nn.Module, method: VisionMethod) -> None:
        assert isinstance(encoder, QwenViT)
        super().__init__(encoder, tower, method, restore=True, side=encoder.side(tower))
        self.grids: Tensor | None = None
        self.groups: list[Frames] = []

    def install(self, handle: Handle) -> None:
        """Also learn the sizes of the pictures."""
        super().install(handle)
        handle.before(self.tower, GridReader(self))

    def forward(self, i: int, block: Any, x: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor | None:
        """Run a block; None means that it may run as it is."""
        if i == 0:
            self.groups = self._groups(x) if self.enabled else []
            self.last = self.groups[0].work if self.groups else None
        if all([self.idle(group.work, i) for group in self.groups]):
            return None
        cos, sin = given["position_embeddings"]
        window, longest = self._windows(given["cu_seqlens"], x)
        out = torch.zeros_like(x)
        for group in self.groups:
            where = group.where
            local = None if window is None else window[where] - window[where[:, :1]]
            tables = {
                "cos": cos[where],
                "sin": sin[where],
                "window": local,
                "windows": None if local is None else (int(local.max()) + 1, longest),
            }
            y = self.run(group.work, i, block, x[where], (), tables)
            out = out.index_copy(0, where.flatten(), y.flatten(0, 1))
        return out

    def _groups(self, x: Tensor) -> list[Frames]:
        """Frames by their size."""
        assert self.grids is not None
        order = window_order(self.tower, self.grids)
        raster = torch.arange(len(x) // self.group) if order is None else order
        raster = raster.to(x.device)
        starts: dict[tuple[int, int], list[int]] = {}
        at = 0
        for t, h, w in self.grids.tolist():
            starts.setdefault((h, w), []).extend(at + i * h * w for i in range(t))
            at += t * h * w
        found = []
        for (h, w), begin in starts.items():
            where = torch.tensor(begin, device=x.device).unsqueeze(1) + torch.arange(h * w, device=x.device)
            first = begin[0] // self.group
            place = raster[first : first + h * w // self.group] - first
            grid = (h // self.side, w // self.side)
            found.append(Frames(work=Pass(start=len(place), place=place, grid=grid), where=where))
        return found

    def _windows(self, bounds: Tensor, x: Tensor) -> tuple[Tensor | None, int]:
        """Window of every patch and the size of the largest; None where blocks look at whole frames."""
        edges = bounds.tolist()
        frames = {int(start) for group in self.groups for start in group.where[:, 0]}
        if set(edges[:-1]) == frames:
            return None, 0
        place = torch.arange(len(x), device=x.device)
        window = torch.searchsorted(bounds.to(place), place, right=True) - 1
        return window, max(b - a for a, b in itertools.pairwise(edges))

    def tiles(self) -> Tiles:
        """All frames as one row, in the tower's order."""
        label, anchor, protect, offset = [], [], [], 0
        place = []
        for group in self.groups:
            found = tiles_of(group.work, self.method, self.prefix, len(group.where))
            place.append((group.where[:, :: self.group] // self.group).flatten())
            label.append(torch.where(found.label >= 0, found.label + offset, -1).flatten())
            anchor.append(found.anchor.flatten())
            protect.append(found.protect.flatten())
            offset += found.label.numel()
        order = torch.cat(place).argsort()
        return Tiles(
            label=torch.cat(label)[order].unsqueeze(0),
            anchor=torch.cat(anchor)[order].unsqueeze(0),
            protect=torch.cat(protect)[order].unsqueeze(0),
        )


class GridReader:
    """Pre-hook of a tower that notes the sizes of its pictures."""

    def __init__(self, runtime: PackedRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note them."""
        self.runtime.grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
