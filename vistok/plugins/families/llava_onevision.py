"""LLaVA-OneVision: pictures as in LLaVA-NeXT, clips as pooled frames with one closing newline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.grid import centre_of
from vistok.plugins.families.base import Block, Smaller
from vistok.plugins.families.llava_next import LlavaNext
from vistok.registry import register


@register("family", "llava_onevision")
class LlavaOnevision(LlavaNext):
    """SigLIP tower; an image is a picture with all its crops, or a clip."""

    hosts = ("LlavaOnevisionForConditionalGeneration",)

    def blocks(self, model: Any, output: Any, kwargs: dict[str, Any], modality: str) -> list[list[Block]]:
        """Grids of every picture or clip."""
        if modality == "image":
            return super().blocks(model, output, kwargs, modality)
        side = math.ceil(self.side(model) / 2)
        found = []
        for clip in self.features(model, output):
            n = len(clip) - 1
            found.append([Block(columns=torch.arange(n), grid=(n // side**2, side, side), newlines=torch.tensor([n]))])
        return found

    def tiles(self, model: Any, kwargs: dict[str, Any]) -> list[int]:
        """Tiles of every picture; several pictures in a sample come in one tile each."""
        counts = super().tiles(model, kwargs)
        per_sample = kwargs.get("batch_num_images")
        if per_sample is None:
            return counts
        alone = [n == 1 for n in per_sample.tolist() for _ in range(n)]
        return [count if crops else 1 for count, crops in zip(counts, alone)]

    def packing(self, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """How many crops are packed at most before the mosaic is shrunk."""
        return {"vision_aspect_ratio": kwargs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio}

    def spread(self, model: Any, kwargs: dict[str, Any], modality: str, tokens: Tensor) -> list[Tensor]:
        """As the host packs pictures, or pools frames."""
        if modality == "image":
            return super().spread(model, kwargs, modality, tokens)
        pooled = self.base(model).apply_pooling(tokens)  # type: ignore[operator]
        clips = pooled.reshape(len(kwargs["pixel_values_videos"]), -1, tokens.shape[-1])
        return list(torch.cat([clips, torch.zeros_like(clips[:, :1])], dim=1))

    def sources(
        self, model: Any, kwargs: dict[str, Any], modality: str, shape: tuple[int, int], device: torch.device
    ) -> list[Tensor]:
        """As in LLaVA-NeXT; in frames, which are pooled, the patch in the middle of what became one feature."""
        if modality == "image":
            return super().sources(model, kwargs, modality, shape, device)
        side = self.side(model)
        axes = torch.meshgrid(torch.arange(shape[0]), torch.arange(side), torch.arange(side), indexing="ij")
        maps = torch.stack([torch.ones_like(axes[0]), *axes], dim=-1).flatten(1, 2).double()
        found = []
        for laid in self.spread(model, kwargs, modality, maps):
            frame, y, x = laid[:, 1:].round().long().unbind(1)
            found.append(torch.where(laid[:, 0] > 0.5, frame * shape[1] + y * side + x, -1).to(device))
        return found

    def encode_smaller(
        self, model: Any, kwargs: dict[str, Any], count: Callable[[int], int], runs: dict[str, list[int]]
    ) -> dict[str, Smaller]:
        """Pictures as in LLaVA-NeXT; frames of half as many patches each way, pooled 2 x 2 like full ones."""
        found = super().encode_smaller(model, kwargs, count, runs) if kwargs.get("pixel_values") is not None else {}
        clips = kwargs.get("pixel_values_videos")
        if clips is not None:
            found["video"] = self._smaller_clips(model, kwargs, clips, count)
        return found

    def _smaller_clips(self, model: Any, kwargs: dict[str, Any], clips: Tensor, count: Callable[[int], int]) -> Smaller:
        side = math.ceil(self.side(model) / 2)
        frames = clips.shape[1]
        n = frames * side**2
        kept = min(frames, count(n))
        small = min(side, math.isqrt(count(n) // kept))
        pixels = clips[:, centre_of(frames, kept, clips.device)].flatten(0, 1)
        patches = self.side(model) if small == side else 2 * small
        output, features = self.project_smaller(model, kwargs, pixels, patches)
        maps = features.transpose(1, 2).unflatten(2, (patches, patches))
        pooled = F.interpolate(maps, size=(small, small), mode="bilinear").flatten(2).transpose(1, 2)
        newline = model.base_model.image_newline[None].to(pooled)
        tokens = [torch.cat([clip.flatten(0, 1), newline]) for clip in pooled.split(kept)]
        full = Block(columns=torch.arange(n), grid=(frames, side, side), newlines=torch.tensor([n]))
        output.pooler_output = torch.stack(tokens)  # one tensor, as the host has it
        grids: list[list[tuple[int, ...]]] = [[(kept, small, small)] for _ in tokens]
        return Smaller(output=output, features=tokens, blocks=[[full] for _ in tokens], grids=grids)
