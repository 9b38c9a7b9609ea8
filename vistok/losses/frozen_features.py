"""Frozen networks whose features a tokenizer learns to predict place by place: CLIP's patches, AlexNet's maps."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok import assets
from vistok.losses.base import FrozenLoss, freeze
from vistok.losses.image_embedding import CLIP_MEAN, CLIP_STD
from vistok.losses.perceptual import Lpips
from vistok.registry import register

_CLIP = {"base": ("vit_base_patch16_clip_224", 16), "large": ("vit_large_patch14_clip_224", 14)}

for _size, (_name, _) in _CLIP.items():
    assets.add(
        assets.Asset(
            name=f"clip_vit_{_size}",
            summary=f"CLIP {_name} (OpenAI), picture tower in timm's layout",
            licence="MIT",
            sources=(assets.Source(filename="model.safetensors", hub=f"timm/{_name}.openai"),),
        )
    )


@register("loss", "clip_patches")
class ClipPatches(FrozenLoss):
    """Patch features of CLIP's picture tower after its last norm, before the projection to the text's space.

    Args:
        size: `base` (patches of 16 pixels) or `large` (of 14), OpenAI's weights.
        weights: timm's file; None looks for asset `clip_vit_base` or `clip_vit_large`, see `vistok.assets.find`.

    Attributes:
        width: Channels of the features.

    Raises:
        AssetError: No weights on this machine, or others; the message lists where they can come from.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, size: Literal["base", "large"] = "large", weights: Path | None = None) -> None:
        import timm

        super().__init__()
        path = assets.find(f"clip_vit_{size}", weights)
        name, self.patch = _CLIP[size]
        self.vit = timm.create_model(name, pretrained=False, num_classes=0)
        found = {k: v for k, v in assets.read_tensors(path).items() if not k.startswith("head.")}
        try:
            self.vit.load_state_dict(found)
        except RuntimeError as err:
            raise assets.AssetError(f"{path} is no timm {name}: {str(err).splitlines()[-1].strip()}") from err
        self.width: int = self.vit.num_features
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        freeze(self)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W), resized to 224 -> (B, h, w, width)."""
        images = F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True)
        tokens = self.vit.forward_features((images - self.mean) / self.std)
        side = 224 // self.patch
        return tokens[:, self.vit.num_prefix_tokens :].unflatten(1, (side, side))


@register("loss", "alex_features")
class AlexFeatures(FrozenLoss):
    """Feature maps of the AlexNet that comes with vistok for LPIPS: a small stand-in where no larger network is.

    Args:
        stage: Which of its five stages.

    Attributes:
        width: Channels of the features.
    """

    def __init__(self, *, stage: Literal[1, 2, 3, 4, 5] = 5) -> None:
        super().__init__()
        self.network = Lpips(net="alex")
        self.stage = stage
        self.width = (64, 192, 384, 256, 256)[stage - 1]
        freeze(self)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W), at least 128 pixels wide inside -> (B, h, w, width)."""
        scale = max(1.0, 128 / min(images.shape[-2:]))
        images = F.interpolate(images, scale_factor=scale, mode="bilinear") if scale > 1 else images
        return list(self.network.features(images))[self.stage - 1].permute(0, 2, 3, 1)
