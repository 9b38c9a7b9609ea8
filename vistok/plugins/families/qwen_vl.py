"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: pictures of any size, 2x2 merge, three-dimensional positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.grid import centre_of, fit_grid
from vistok.compress.reduction import Reduction
from vistok.plugins.families.base import PIXELS, Block, Family, Smaller
from vistok.plugins.families.qwen_vit import window_order
from vistok.registry import register

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


@register("family", "qwen2_vl")
class Qwen2VL(Family):
    """An image is a picture or a clip; positions of the uncompressed prompt are always kept."""

    hosts: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
    mrope = True
    consumed = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    withheld: ClassVar[dict[str, str]] = {
        "class_token": "its tower has none",
        "patches": "its projector takes four at a time",
    }

    def tower(self, model: Any) -> Any:
        """The vision module."""
        return model.base_model.visual

    def merge(self, model: Any) -> int:
        """Side of the patches that become one token."""
        return int(model.config.vision_config.spatial_merge_size)

    def blocks(self, model: Any, output: Any, kwargs: dict[str, Any], modality: str) -> list[list[Block]]:
        """One grid per picture or clip, in units of tokens."""
        return [[self._block(model, grid)] for grid in kwargs[GRIDS[modality]].tolist()]

    def _block(self, model: Any, grid: list[int]) -> Block:
        t, h, w = grid
        m = self.merge(model)
        tokens = (t, h // m, w // m)
        return Block(columns=torch.arange(tokens[0] * tokens[1] * tokens[2]), grid=tokens if t > 1 else tokens[1:])

    def attentions(self, model: Any) -> list[Any]:
        """Attention of every block, queries, keys and values in one projection."""
        return [block.attn for block in self.tower(model).blocks]

    def block_number(self, model: Any, block: int, depth: int) -> int:
        """As usual, but where most blocks look at windows only, the next one that looks at the whole picture."""
        number = super().block_number(model, block, depth)
        whole = getattr(self.tower(model), "fullatt_block_indexes", None) or range(depth)
        return min((i for i in whole if i >= number), default=max(whole))

    def projector(self, model: Any) -> Any:
        """Merges patches and projects them."""
        return self.tower(model).merger

    def pooled(self, model: Any, patches: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Means over the patches of a token, in the order of the features."""
        return self._in_order(model, patches[0].unflatten(0, (-1, self.merge(model) ** 2)).mean(1), kwargs)

    def unprojected(self, model: Any, inputs: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The patches of a token side by side, in the order of the features."""
        return self._in_order(model, inputs.unflatten(0, (-1, self.merge(model) ** 2)).flatten(1), kwargs)

    def _in_order(self, model: Any, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Undo the order of windows that some towers work in, (n, C) -> (1, n, C)."""
        grids = [kwargs[name] for modality, name in GRIDS.items() if kwargs.get(PIXELS[modality]) is not None]
        order = window_order(self.tower(model), grids[0])
        if order is None:
            return tokens.unsqueeze(0)
        return tokens[torch.argsort(order.to(tokens.device))].unsqueeze(0)

    def in_order(self, model: Any, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Undo the order of windows."""
        return self._in_order(model, tokens[0], kwargs)

    def spread(self, model: Any, kwargs: dict[str, Any], modality: str, tokens: Tensor) -> list[Tensor]:
        """One piece per picture or clip."""
        sizes = (kwargs[GRIDS[modality]].prod(-1) // self.merge(model) ** 2).tolist()
        return list(tokens[0].split(sizes))

    def project(self, model: Any, tokens: Tensor) -> Tensor:
        """Back to patches, through the merger."""
        found: Tensor = self.projector(model)(tokens.reshape(len(tokens) * self.merge(model) ** 2, -1))
        return found

    def positions(self, model: Any, kwargs: dict[str, Any], *, generating: bool) -> Tensor:
        """Text position, time, height and width of every column, (4, B, L)."""
        text = super().positions(model, kwargs, generating=generating)
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {n: kwargs[n] for n in (*names, "attention_mask") if kwargs.get(n) is not None}
        if "input_ids" not in given or "mm_token_type_ids" not in given:
            raise ValueError(
                "Three-dimensional positions need input_ids and mm_token_type_ids, as the processor gives."
            )
        axes: Tensor = model.base_model.get_rope_index(**given)[0]
        return torch.cat([text.unsqueeze(0).to(axes), axes])

    def encode_smaller(
        self, model: Any, kwargs: dict[str, Any], count: Callable[[int], int], runs: dict[str, list[int]]
    ) -> dict[str, Smaller]:
        """Resize every picture to a smaller grid of whole tokens and recompute the grid."""
        changed, found = dict(kwargs), {}
        blocks: dict[str, list[list[Block]]] = {}
        smalls: dict[str, list[list[tuple[int, ...]]]] = {}
        for modality, name in PIXELS.items():
            if kwargs.get(name) is None:
                continue
            grids = kwargs[GRIDS[modality]].tolist()
            pieces = kwargs[name].split([t * h * w for t, h, w in grids])
            blocks[modality] = [[self._block(model, grid)] for grid in grids]
            smalls[modality], resized, new_grids = [], [], []
            for patches, grid, (block,) in zip(pieces, grids, blocks[modality]):
                assert block.grid is not None
                tokens = fit_grid(block.grid, count(block.length))
                small, new_grid = self._resize(model, patches, grid, tokens)
                resized.append(small)
                new_grids.append(new_grid)
                smalls[modality].append([tokens])
            changed[name] = torch.cat(resized)
            changed[GRIDS[modality]] = torch.tensor(new_grids, device=kwargs[GRIDS[modality]].device)
        for modality, output in self.encode(model, changed).items():
            features = self.features(model, output)
            found[modality] = Smaller(output=output, features=features, blocks=blocks[modality], grids=smalls[modality])
        return found

    def _resize(
        self, model: Any, patches: Tensor, grid: list[int], tokens: tuple[int, ...]
    ) -> tuple[Tensor, list[int]]:
        """Patches (t h w, C * T * p * p), in groups of merged ones, of the same picture with fewer tokens."""
        t, h, w = grid
        new_t, (new_h, new_w) = (1 if len(tokens) == 2 else tokens[0]), (s * self.merge(model) for s in tokens[-2:])
        if (new_t, new_h, new_w) == (t, h, w):
            return patches, grid
        m, vision = self.merge(model), model.config.vision_config
        depth, side = vision.temporal_patch_size, vision.patch_size
        blocks = patches.view(t, h // m, w // m, m, m, -1, depth, side, side)
        pictures = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t, -1, h * side, w * side)  # (t, T * C, H, W)
        pictures = pictures[centre_of(t, new_t, pictures.device)]
        size = (new_h * side, new_w * side)
        small = F.interpolate(pictures.float(), size, mode="bicubic", antialias=True).to(patches.dtype)
        back = small.view(new_t, depth, -1, new_h // m, m, side, new_w // m, m, side)
        back = back.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # (t, h/m, w/m, m, m, C, T, p, p)
        return back.reshape(new_t * new_h * new_w, -1), [new_t, new_h, new_w]


@register("family", "qwen3_vl")
class Qwen3VL(Qwen2VL):
    """As its elders; what its tower adds to the first decoder layers is reduced along."""

    hosts = ("Qwen3VLForConditionalGeneration",)

    def rebuild_extra(self, output: Any, reductions: list[Reduction]) -> None:
        """Reduce the deepstack features of every picture like its own."""
        output.deepstack_features = [
            [r.apply(f.unsqueeze(0))[0] if len(f) == r.length else f for f, r in zip(level, reductions)]
            for level in output.deepstack_features
        ]
