"""Representation alignment: features of a network in training are pulled towards those of a frozen DINOv2."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok import assets
from vistok.losses.base import FrozenLoss, freeze
from vistok.registry import register

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 14
_NAMES = {"small": "vits14", "base": "vitb14", "large": "vitl14"}

for _size, _short in _NAMES.items():
    assets.add(
        assets.Asset(
            name=f"dinov2_{_short}",
            summary=f"DINOv2 {_short} (arXiv 2304.07193), backbone",
            licence="Apache-2.0",
            sources=(
                assets.Source(filename="model.safetensors", hub=f"timm/vit_{_size}_patch14_dinov2.lvd142m"),
                assets.Source(
                    filename=f"dinov2_{_short}_pretrain.pth",
                    url=f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{_short}/dinov2_{_short}_pretrain.pth",
                ),
            ),
        )
    )


@register("loss", "repa")
class Repa(FrozenLoss):
    """REPA (arXiv 2410.06940): minus the mean cosine between projected features and DINOv2's patch features.

    Both are resized bilinearly to one grid first. FlexTok has DINOv2-L and a grid of 37 x 37, which is its own at 518
    pixels; how large a picture it saw was not published, a third party's trainer feeds 224 pixels and interpolates.

    Args:
        teacher: Size of the DINOv2 (timm's `vit_*_patch14_dinov2`), or the name of another vision transformer of timm,
            which needs `weights`.
        image_size: Side at which the teacher sees the picture, a multiple of its patches (14 for DINOv2).
        grid: Side of the common grid.
        antialias: Low-pass the picture before it is shrunk (REPA's and GigaTok's code do not).
        weights: File of the teacher's weights; None looks for asset `dinov2_vits14`, `_vitb14` or `_vitl14`, see
            `vistok.assets.find`.

    Attributes:
        width: Channels of the teacher's features.

    Raises:
        AssetError: No weights on this machine, or others; the message lists where they can come from.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        *,
        teacher: str = "large",
        image_size: int = 518,
        grid: int = 37,
        antialias: bool = True,
        weights: Path | None = None,
    ) -> None:
        import timm

        super().__init__()
        name = f"vit_{teacher}_patch14_dinov2" if teacher in _NAMES else teacher
        if teacher not in _NAMES and (weights is None or not timm.is_model(name)):
            raise ValueError(
                f"teacher is one of {', '.join(_NAMES)}, or a vision transformer of timm with its file as `weights`; "
                f"got {teacher!r} and {weights}."
            )
        path = weights if teacher not in _NAMES else assets.find(f"dinov2_{_NAMES[teacher]}", weights)
        self.patch = PATCH if teacher in _NAMES else _patch(name)
        if image_size < self.patch or image_size % self.patch or grid < 1:
            raise ValueError(
                f"image_size is a multiple of {self.patch} and grid positive, got {image_size} and {grid}."
            )
        self.vit = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size)
        _load(self.vit, assets.read_tensors(path), path)
        self.width: int = self.vit.num_features
        self.image_size, self.grid, self.antialias = image_size, grid, antialias
        moments = (self.vit.pretrained_cfg.get(key) for key in ("mean", "std"))
        mean, std = (torch.tensor(m or d).view(1, 3, 1, 1) for m, d in zip(moments, (MEAN, STD)))
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", mean)
        freeze(self)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> normalised patch features (B, h, w, width)."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=self.antialias)
        tokens = self.vit.forward_features((images - self.shift) * self.scale)
        side = self.image_size // self.patch
        return tokens[:, self.vit.num_prefix_tokens :].unflatten(1, (side, side))

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """Loss of every picture, float32.

        Args:
            features: Projected features, (B, h, w, width).
            images: The clean pictures in [0, 1], (B, 3, H, W).

        Returns:
            (B,), between -1 (aligned) and 1.

        Raises:
            ValueError: Features of another width.
        """
        if features.ndim != 4 or features.shape[-1] != self.width:
            raise ValueError(
                f"The teacher's features have {self.width} channels, got {tuple(features.shape)}. "
                f"Set the model's repa_dim to {self.width}."
            )
        own, target = (_resized(x.float(), self.grid) for x in (features, self.features(images)))
        return -F.cosine_similarity(own, target, dim=1).flatten(1).mean(1)


def _patch(name: str) -> int:
    """Side of the patches of a vision transformer of timm.

    Raises:
        ValueError: It has none.
    """
    import timm

    with torch.device("meta"):
        embed = getattr(timm.create_model(name, pretrained=False, num_classes=0), "patch_embed", None)
    if embed is None:
        raise ValueError(f"{name!r} is no vision transformer: it has no patches.")
    return int(embed.patch_size[0])


def _resized(x: Tensor, side: int) -> Tensor:
    """(B, h, w, D) -> (B, D, side, side)."""
    x = x.permute(0, 3, 1, 2)
    return x if x.shape[-2:] == (side, side) else F.interpolate(x, size=(side, side), mode="bilinear")


def _load(vit: torch.nn.Module, found: dict[str, Tensor], path: Path) -> None:
    """Load timm's or Meta's file; positions are interpolated to the size at hand as timm does it."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    found = {re.sub(r"^(module|backbone)\.", "", k): v for k, v in found.items() if not k.endswith("mask_token")}
    try:
        vit.load_state_dict(checkpoint_filter_fn(found, vit))
    except (RuntimeError, KeyError, AttributeError) as err:
        raise assets.AssetError(f"{path} is no DINOv2 of this size: {str(err).splitlines()[0]}") from err
