"""Perceptual losses: LPIPS (Zhang et al., arXiv 1801.03924) and the ConvNeXt logits of TiTok.

LPIPS here is version 0.1 as everybody uses it; AlexNet weights are shipped, VGG16 comes through `vistok.assets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok import assets
from vistok.losses.base import FrozenLoss, check_pair, freeze
from vistok.registry import register

Net = Literal["alex", "vgg"]

# Stages as (max-pool window before the stage or 0, convolutions as (in, out, kernel, stride, padding)). The features
# after the last ReLU of every stage are compared. `_INDEX` numbers the same convolutions as torchvision does.
_STAGES: Mapping[str, tuple[tuple[int, tuple[tuple[int, int, int, int, int], ...]], ...]] = {
    "alex": (
        (0, ((3, 64, 11, 4, 2),)),
        (3, ((64, 192, 5, 1, 2),)),
        (3, ((192, 384, 3, 1, 1),)),
        (0, ((384, 256, 3, 1, 1),)),
        (0, ((256, 256, 3, 1, 1),)),
    ),
    "vgg": (
        (0, ((3, 64, 3, 1, 1), (64, 64, 3, 1, 1))),
        (2, ((64, 128, 3, 1, 1), (128, 128, 3, 1, 1))),
        (2, ((128, 256, 3, 1, 1), (256, 256, 3, 1, 1), (256, 256, 3, 1, 1))),
        (2, ((256, 512, 3, 1, 1), (512, 512, 3, 1, 1), (512, 512, 3, 1, 1))),
        (2, ((512, 512, 3, 1, 1), (512, 512, 3, 1, 1), (512, 512, 3, 1, 1))),
    ),
}
_INDEX: Mapping[str, tuple[int, ...]] = {
    "alex": (0, 3, 6, 8, 10),
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
}
_HEADS = {"alex": "lpips_alex", "vgg": "lpips_vgg_heads"}  # where the linear heads are if the file has none
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


@register("loss", "lpips")
class Lpips(FrozenLoss):
    """LPIPS v0.1, the perceptual distance of AlexNet or VGG16 features, per picture.

    Features of five stages, each scaled to unit length per position (1e-10 added to the length), squared difference,
    weighted over channels by a learnt head, averaged over positions, summed over stages. Convolutions run in the
    caller's autocast type (half precision shifts LPIPS by about 1e-3); lengths and differences are float32. Metrics
    call it with autocast off.

    Args:
        net: `alex` (shipped, 20 times cheaper) or `vgg` (what VQGAN and TiTok train with).
        weights: A file of your own: ours, an official LPIPS state dict, a torchvision state dict (the heads are
            then the shipped ones), or the pickle of the carrier package.

    Raises:
        AssetError: No weights on this machine; the message lists where they can come from.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, *, net: Net = "alex", weights: Path | None = None) -> None:
        super().__init__()
        self.net = net
        path = assets.find(f"lpips_{net}", weights)
        self.weights_sha256 = assets.sha256(path)
        specs = [conv for _, convs in _STAGES[net] for conv in convs]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, stride=s, padding=p) for i, o, k, s, p in specs)
        self.heads = nn.ParameterList(torch.zeros(convs[-1][1]) for _, convs in _STAGES[net])
        self.load_state_dict(read_lpips(path, net))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        freeze(self)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [0, 1] -> (B,), float32, 0 for equal pictures.

        Raises:
            ValueError: The batches differ in shape, are no float pictures, or are smaller than 32 x 32.
        """
        check_pair(reconstruction, target, least=32)
        with torch.set_grad_enabled(torch.is_grad_enabled() and target.requires_grad):
            wanted = [_unit(f) for f in self.features(target)]
        total = wanted[0].new_zeros(len(target))
        for head, feature, want in zip(self.heads, self.features(reconstruction), wanted):
            difference = (
                (_unit(feature) - want).square().mean((2, 3))
            )  # (B, C): the head is linear, so the mean goes first
            total = total + (difference * head).sum(1)
        return total

    def features(self, images: Tensor) -> Iterator[Tensor]:
        """The five feature maps of a batch in [0, 1], (B, C, h, w) each, not normalised."""
        x = (2.0 * images - 1.0 - self.shift) / self.scale
        convs = iter(self.convs)
        for pool, specs in _STAGES[self.net]:
            x = F.max_pool2d(x, pool, stride=2) if pool else x
            for _ in specs:
                x = F.relu(next(convs)(x))
            yield x


def unpooled_stages(network: Lpips) -> list[list[nn.Module]]:
    """The convolutions of every stage, for those who pool in their own way (DISTS)."""
    convs = iter(network.convs)
    return [[next(convs) for _ in specs] for _, specs in _STAGES[network.net]]


def _unit(x: Tensor) -> Tensor:
    """Unit length over channels, at least float32. The length is LPIPS's own: 1e-10 is added after the root."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # the root has an infinite slope at 0, and a position whose features are all 0 does occur
    length = x.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt()
    return x / (length + 1e-10)


@register("loss", "convnext_logits")
class ConvNextLogits(FrozenLoss):
    """TiTok's classifier loss: mean squared difference of the 1000 ImageNet logits of ConvNeXt-S, per picture.

    Both pictures are resized to 224 (bilinear, antialias). From the official code of arXiv 2406.07550 (the paper calls
    it a perceptual loss); published weights were trained with it.

    Args:
        weights: torchvision's `convnext_small-0c510722.pth`; None looks for it, see `vistok.assets.find`.

    Raises:
        AssetError: No weights on this machine; the message lists where they can come from.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, weights: Path | None = None) -> None:
        super().__init__()
        path = assets.find("convnext_small", weights)
        from torchvision.models import convnext_small

        self.weights_sha256 = assets.sha256(path)
        self.classifier = convnext_small(weights=None)
        self.classifier.load_state_dict(assets.read_tensors(path))
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))
        freeze(self)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [0, 1] -> (B,), float32.

        Raises:
            ValueError: The batches differ in shape or are no float pictures.
        """
        check_pair(reconstruction, target)
        with torch.set_grad_enabled(torch.is_grad_enabled() and target.requires_grad):
            wanted = self.logits(target)
        return (self.logits(reconstruction) - wanted).square().mean(1)

    def logits(self, images: Tensor) -> Tensor:
        """ImageNet logits of a batch in [0, 1], (B, 1000), float32."""
        x = F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        return self.classifier((x - self.mean) / self.std).float()


def read_lpips(path: str | Path, net: Net) -> dict[str, Tensor]:
    """LPIPS weights of any known layout as `convs.i.weight`, `convs.i.bias`, `heads.j` in float32.

    Args:
        path: See `Lpips`.
        net: Which network the file is for.

    Raises:
        UnreadableError: The file is unreadable or holds something else.
    """
    raw = assets.read(path)
    inner = next((k for k in ("AlexNet_0", "VGG16_0") if k in raw), None)
    table = _from_carrier(raw, inner) if inner else _from_torch(assets.read_tensors(path), net)
    stages = len(_STAGES[net])
    if not any(k.startswith("heads.") for k in table):
        heads = assets.read_tensors(assets.find(_HEADS[net]))
        table |= {k: v for k, v in heads.items() if k.startswith("heads.")}
    found = sum(k.endswith("weight") for k in table)
    if found != len(_INDEX[net]) or any(f"heads.{j}" not in table for j in range(stages)):
        raise assets.UnreadableError(
            f"{path} holds no LPIPS weights for {net!r}: found {found} of {len(_INDEX[net])} convolutions. "
            f"Allowed are our own file, an LPIPS state dict, torchvision's state dict of that network."
        )
    return {k: v.float() for k, v in table.items()}


def _from_carrier(raw: Mapping[str, Any], inner: str) -> dict[str, Tensor]:
    """JAX layout: kernels are (height, width, in, out)."""
    table = {}
    for name, entry in raw[inner].items():
        i = name.removeprefix("Conv_")
        table[f"convs.{i}.weight"] = torch.from_numpy(entry["kernel"].copy()).permute(3, 2, 0, 1)
        table[f"convs.{i}.bias"] = torch.from_numpy(entry["bias"].copy())
    for name, entry in raw.items():
        if name.startswith("NetLinLayer_"):
            head = entry.get("Conv_0", entry)["kernel"]
            table[f"heads.{name.removeprefix('NetLinLayer_')}"] = torch.from_numpy(head.copy()).flatten()
    return table


def _from_torch(raw: Mapping[str, Tensor], net: Net) -> dict[str, Tensor]:
    """Our own keys, LPIPS's (`net.slice1.0.weight`, `lin0.model.1.weight`) or torchvision's (`features.0.weight`)."""
    table = {k: v for k, v in raw.items() if k.startswith(("convs.", "heads."))}
    for key, value in raw.items():
        conv = re.fullmatch(r"(?:features|net\.slice\d+)\.(\d+)\.(weight|bias)", key)
        head = re.fullmatch(r"lin(\d)\.model\.1\.weight", key)
        if conv and int(conv[1]) in _INDEX[net]:
            table[f"convs.{_INDEX[net].index(int(conv[1]))}.{conv[2]}"] = value
        elif head:
            table[f"heads.{head[1]}"] = value.flatten()
    return table
