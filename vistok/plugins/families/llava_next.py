"""LLaVA-NeXT: a base grid and an unpadded mosaic whose rows end in a newline."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.compress.crops import split_axis, valid_rectangle
from vistok.plugins.families.base import Block, Family, Patches, Smaller, resized
from vistok.registry import register


def anyres_blocks(features: Tensor, newline: Tensor | None) -> list[Block]:
    """Grids of one packed image: base, then mosaic; newlines are found by comparing with the newline vector.

    Args:
        features: (N, D).
        newline: (D,), None if the host has none.
    """
    n = len(features)
    ends = torch.zeros(0, dtype=torch.int64)
    if newline is not None:
        ends = torch.where((features == newline.to(features)).all(-1))[0].cpu()
    if len(ends) == 0 or (len(ends) == 1 and ends[0] == n - 1):  # a single crop, closed by one newline
        side = math.isqrt(n - len(ends))
        square = side * side == n - len(ends)
        grid = (side, side) if square else None
        return [Block(columns=torch.arange(n - len(ends)), grid=grid, newlines=ends)]
    step = int(ends[1] - ends[0]) if len(ends) > 1 else int(n - ends[0] + 1)
    start = int(ends[0]) - step + 1
    base = math.isqrt(start)
    rows = torch.arange(start, n).view(-1, step)
    mosaic = Block(columns=rows[:, :-1].flatten(), grid=(len(rows), step - 1), newlines=rows[:, -1])
    first = Block(columns=torch.arange(start), grid=(base, base) if base * base == start else None, overview=True)
    return [first, mosaic]


def crop_edges(block: Block, size: tuple[int, int], layout: tuple[int, int], side: int) -> Block:
    """A mosaic that knows where its crops end.

    Args:
        block: The mosaic, without the padding around the picture; smaller than the crops if the host shrank it.
        size: Height and width of the picture.
        layout: Rows and columns of crops.
        side: Tokens along the side of a crop.
    """
    assert block.grid is not None
    top, bottom, left, right = valid_rectangle((size[1], size[0]), layout, side)
    axes = []
    for span, crops, now in zip(((top, bottom), (left, right)), layout, block.grid):
        pieces = split_axis(span, side, crops)
        edges = [round(start * now / (span[1] - span[0])) for start, _ in pieces] + [now]
        axes.append(tuple(b - a for a, b in itertools.pairwise(edges)))
    return dataclasses.replace(block, rows=axes[0], cols=axes[1])


def small_side(
    side: int, size: tuple[int, int], layout: tuple[int, int], count: int, blocks: list[Block]
) -> tuple[int, bool]:
    """Side of the tiles with which a picture has at most `count` tokens, and whether its crops are used.

    The full side with crops means the picture as it is.

    Args:
        side: Of the full tiles, in tokens.
        size: Width and height of the picture.
        layout: Rows and columns of crops.
        count: Tokens allowed, newlines not counted.
        blocks: Grids of the full picture.
    """
    if count >= sum(block.length for block in blocks):
        return side, True
    for small in range(side - 1, 0, -1) if len(blocks) > 1 else ():
        assert blocks[1].grid is not None
        top, bottom, left, right = valid_rectangle(size, layout, small)
        h, w = bottom - top, right - left
        if 0 < h <= blocks[1].grid[0] and 0 < w <= blocks[1].grid[1] and small**2 + h * w <= count:
            return small, True
    return min(side, math.isqrt(count)), False


@register("family", "llava_next")
class LlavaNext(Family):
    """Several crops per picture; an image is the whole of base grid and mosaic."""

    hosts = ("LlavaNextForConditionalGeneration",)
    withheld: ClassVar[dict[str, str]] = {
        "one_grid": "its pictures come as overview and crops, with newlines between the rows",
        "class_token": "every crop has its own",
    }

    def blocks(self, model: Any, output: Any, kwargs: dict[str, Any], modality: str) -> list[list[Block]]:
        """Base grid and mosaic of every picture; where crops end is known if `image_sizes` are given."""
        newline = getattr(self.base(model), "image_newline", None)
        found = [anyres_blocks(f, newline) for f in self.features(model, output)]
        if kwargs.get("image_sizes") is None:
            return found
        for image, size in zip(found, kwargs["image_sizes"].tolist()):
            if len(image) == 2:
                image[1] = crop_edges(image[1], tuple(size), self.layout(model, size), self.side(model))
        return found

    def side(self, model: Any) -> int:
        """Patches along the side of a crop."""
        vision = model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    def layout(self, model: Any, size: list[int]) -> tuple[int, int]:
        """Rows and columns of crops of a picture of that height and width."""
        module = sys.modules[type(self.base(model)).__module__]
        config = model.config
        shape = module.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return int(shape[0]), int(shape[1])

    def tiles(self, model: Any, kwargs: dict[str, Any]) -> list[int]:
        """Tiles of every picture."""
        layouts = [self.layout(model, size) for size in kwargs["image_sizes"].tolist()]
        return [1 + rows * cols for rows, cols in layouts]

    def packing(self, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Further arguments of the host's own packing."""
        given = kwargs.get("vision_feature_select_strategy")
        return {"vision_feature_select_strategy": given or model.config.vision_feature_select_strategy}

    def spread(self, model: Any, kwargs: dict[str, Any], modality: str, tokens: Tensor) -> list[Tensor]:
        """As the host packs features, with zeros for newlines."""
        base: Any = self.base(model)
        newline = None if base.image_newline is None else tokens.new_zeros(tokens.shape[-1])
        tiles = tokens.split(self.tiles(model, kwargs))
        packing = self.packing(model, kwargs)
        packed, _ = base.pack_image_features(tiles, kwargs["image_sizes"], image_newline=newline, **packing)
        return list(packed)

    def sources(
        self, model: Any, kwargs: dict[str, Any], modality: str, shape: tuple[int, int], device: torch.device
    ) -> list[Tensor]:
        """As usual; where the host shrinks a mosaic, the patch in the middle of what became one feature."""
        side, tiles = self.side(model), self.tiles(model, kwargs)
        y, x = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij"))
        cols = [self.layout(model, size)[1] for size in kwargs["image_sizes"].tolist()]
        numbers = [(number, columns) for count, columns in zip(tiles, cols) for number in range(count)]
        cells = [divmod(max(number - 1, 0), columns) for number, columns in numbers]
        maps = [
            torch.stack([torch.ones_like(x), torch.full_like(x, number == 0), y + side * r, x + side * c], dim=1)
            for (number, _), (r, c) in zip(numbers, cells)
        ]
        found, first = [], 0
        for laid, count, columns in zip(self.spread(model, kwargs, modality, torch.stack(maps)), tiles, cols):
            row, col = laid[:, 2].round().long(), laid[:, 3].round().long()
            crop = torch.where(laid[:, 1] > 0.5, 0, 1 + row // side * columns + col // side)
            number = (first + crop) * shape[1] + row % side * side + col % side
            found.append(torch.where(laid[:, 0] > 0.5, number, -1).to(device))
            first += count
        return found

    def encode_smaller(
        self, model: Any, kwargs: dict[str, Any], count: Callable[[int], int], runs: dict[str, list[int]]
    ) -> dict[str, Smaller]:
        """All tiles of a picture on smaller squares; the small mosaic is unpadded like the full one."""
        side, tiles = self.side(model), self.tiles(model, kwargs)
        pieces, blocks = self._tiled(model, kwargs)
        sizes = kwargs["image_sizes"].tolist()
        layouts = [self.layout(model, size) if n > 1 else (0, 0) for size, n in zip(sizes, tiles)]
        plan = [
            small_side(side, (size[1], size[0]), layout, count(sum(b.length for b in image)), image)
            for size, layout, image in zip(sizes, layouts, blocks)
        ]
        found: list[Tensor] = [pieces[0]] * len(plan)
        grids: list[list[tuple[int, ...]]] = [[] for _ in plan]
        output: Any = None
        for small in sorted({s for s, _ in plan}):
            mine = [i for i, (s, _) in enumerate(plan) if s == small]
            used = [pieces[i] if plan[i][1] else pieces[i][:1] for i in mine]
            output, features = self.project_smaller(model, kwargs, torch.cat(used), small)
            for i, f in zip(mine, features.split([len(u) for u in used])):
                if plan[i] == (side, True):
                    found[i], grids[i] = self._as_it_is(model, kwargs, f, i), [b.grid or () for b in blocks[i]]
                    continue
                layout = layouts[i] if plan[i][1] else (0, 0)
                found[i], grids[i] = self._packed(model, f, small, (sizes[i][1], sizes[i][0]), layout, blocks[i])
        output.pooler_output = found  # a list, as the host has it
        return {"image": Smaller(output=output, features=found, blocks=blocks, grids=grids)}

    def _tiled(self, model: Any, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[list[Block]]]:
        """Pixels of every picture's tiles, without padding, and its grids."""
        side, tiles = self.side(model), self.tiles(model, kwargs)
        pixels: Tensor = kwargs["pixel_values"]
        pieces = [p[:n] for p, n in zip(pixels, tiles)] if pixels.ndim == 5 else list(pixels.split(tiles))
        ones = self.spread(model, kwargs, "image", pixels.new_ones(sum(tiles), side**2, 1))
        plain = None if model.base_model.image_newline is None else pixels.new_zeros(1)
        return pieces, [anyres_blocks(f, plain) for f in ones]

    def patches(self, model: Any, kwargs: dict[str, Any]) -> Patches:
        """Overview and crops of every picture."""
        side = self.side(model)
        pieces, blocks = self._tiled(model, kwargs)
        output, features, states = self.tower_states(model, kwargs, torch.cat(pieces))
        tiles = [len(piece) for piece in pieces]
        return Patches(output=output, features=features, states=states, grid=(side, side), tiles=tiles, blocks=blocks)

    def placed(self, model: Any, kwargs: dict[str, Any], patches: Patches, features: Tensor, side: int) -> Smaller:
        """Smaller tiles, unpadded like the full ones, with a newline behind every row."""
        sizes = kwargs["image_sizes"].tolist()
        found: list[Tensor] = []
        grids: list[list[tuple[int, ...]]] = []
        for tiles, size, blocks in zip(features.split(patches.tiles), sizes, patches.blocks):
            layout = self.layout(model, size) if len(tiles) > 1 else (0, 0)
            if len(blocks) == 1:  # the padding left nothing of the crops
                layout = (0, 0)
            packed = self._packed(model, tiles, patches.grid[0] // side, (size[1], size[0]), layout, blocks)
            if any(n > o for block, small in zip(blocks, packed[1]) for n, o in zip(small, block.grid or small)):
                raise ValueError(
                    f"A picture of {size[1]} x {size[0]} pixels: windows of {side} leave more than the host."
                )
            found.append(packed[0])
            grids.append(packed[1])
        patches.output.pooler_output = found  # a list, as the host has it
        return Smaller(output=patches.output, features=found, blocks=patches.blocks, grids=grids)

    def project_smaller(self, model: Any, kwargs: dict[str, Any], tiles: Tensor, small: int) -> tuple[Any, Tensor]:
        """Tiles as squares of small x small patches through tower and projector: output and (tiles, n, D)."""
        patch = model.config.vision_config.patch_size
        size = (small * patch, small * patch)
        pixels = tiles if tiles.shape[-2:] == size else resized(tiles, size)
        output, hidden, _ = self.tower_states(model, kwargs, pixels, interpolate_pos_encoding=True)
        return output, self.projector(model)(hidden)

    def _as_it_is(self, model: Any, kwargs: dict[str, Any], features: Tensor, number: int) -> Tensor:
        """Features of one picture (tiles, P, D) as the host packs them."""
        base, size = model.base_model, kwargs["image_sizes"][number : number + 1]
        packing = self.packing(model, kwargs)
        found: Tensor = base.pack_image_features([features], size, image_newline=base.image_newline, **packing)[0][0]
        return found

    def _packed(
        self,
        model: Any,
        features: Tensor,
        side: int,
        size: tuple[int, int],
        layout: tuple[int, int],
        blocks: list[Block],
    ) -> tuple[Tensor, list[tuple[int, ...]]]:
        """Features of one picture (tiles, side * side, D) as the host would pack them, and their grids."""
        newline = model.base_model.image_newline
        ends = features.new_zeros(0, features.shape[-1]) if newline is None else newline[None].to(features)
        if len(blocks) == 1:  # a closing newline, unless the padding left nothing of the crops
            return torch.cat([features[0], ends[: len(blocks[0].newlines)]]), [(side, side)]
        if layout == (0, 0):
            return features[0], [(side, side), ()]
        top, bottom, left, right = valid_rectangle(size, layout, side)
        mosaic = features[1:].view(*layout, side, side, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        mosaic = mosaic[top:bottom, left:right]
        grid = (int(mosaic.shape[0]), int(mosaic.shape[1]))
        mosaic = torch.cat([mosaic, ends.expand(len(mosaic), *ends.shape)], dim=1)
        return torch.cat([features[0], mosaic.flatten(0, 1)]), [(side, side), grid]
