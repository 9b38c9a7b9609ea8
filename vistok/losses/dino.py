"""The discriminator of VAR and GigaTok: small trained heads on the features of a frozen DINO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok import assets
from vistok.layers.norm import LocalBatchNorm1d
from vistok.layers.transformer import Block
from vistok.losses.base import freeze
from vistok.losses.diff_augment import DiffAugment
from vistok.registry import register

SIZE, PATCH, WIDTH, HEADS = 224, 16, 384, 6  # of DINO ViT-S/16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

assets.add(
    assets.Asset(
        name="dino_vits16",
        summary="DINO ViT-S/16 (arXiv 2104.14294), backbone",
        licence="Apache-2.0",
        sources=(
            assets.Source(
                filename="dino_deitsmall16_pretrain.pth",
                url="https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
            ),
            assets.Source(filename="model.safetensors", hub="timm/vit_small_patch16_224.dino"),
        ),
    )
)


class DinoTrunk(nn.Module):
    """DINO ViT-S/16 up to the last block that is read, frozen.

    Read is the stream after the embedding and after each named block: patch tokens plus class token. The published
    trunk zeroes the bias of the keys, which changes nothing (softmax does not see it), and computes GELU by its tanh
    form where DINO was trained with the exact one; we follow the latter difference.

    Args:
        read_outs: Blocks after which the stream is read, counted from 0, increasing.
        weights: File of weights, see `vistok.assets.find`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, read_outs: tuple[int, ...], weights: Path | None) -> None:
        super().__init__()
        self.read_outs = read_outs
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + 1, WIDTH))
        blocks = [Block(WIDTH, HEADS, eps=1e-6) for _ in range(max(read_outs, default=-1) + 1)]
        for block in blocks:
            block.mlp.act = nn.GELU("tanh")
        self.blocks = nn.ModuleList(blocks)
        self._load(assets.find("dino_vits16", weights))
        mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)
        freeze(self)

    def _load(self, path: Path) -> None:
        found, wanted = assets.read_tensors(path), self.state_dict()
        wrong = [k for k, v in wanted.items() if k not in found or found[k].shape != v.shape]
        if wrong:
            raise assets.AssetError(
                f"{path} is no DINO ViT-S/16: {len(wrong)} of {len(wanted)} tensors are absent or of another shape "
                f"(first: {wrong[0]}). Get dino_deitsmall16_pretrain.pth or timm's vit_small_patch16_224.dino."
            )
        self.load_state_dict({k: found[k] for k in wanted})  # blocks behind the last read-out are left out

    def forward(self, images: Tensor) -> list[Tensor]:
        """Pictures around [-1, 1], (B, 3, 224, 224) -> read-outs, (B, 384, 196) each."""
        x = self.patch_embed["proj"](self.scale * images + self.shift).flatten(2).transpose(1, 2)  # (B, 196, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        found = [_read(x)]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.read_outs:
                found.append(_read(x))
        return found


def _read(x: Tensor) -> Tensor:
    """Stream (B, 1 + N, D) -> (B, D, N)."""
    return (x[:, 1:] + x[:, :1]).transpose(1, 2)


class SpectralConv1d(nn.Module):
    """1D convolution whose weight is divided by its largest singular value (arXiv 1802.05957), circular padding.

    Keys and arithmetic are those of `torch.nn.utils.spectral_norm`, one power iteration per forward pass in training;
    unlike it, the layer can be copied after a backward pass.

    Args:
        inner: Channels in.
        outer: Channels out.
        kernel: Odd width.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, inner: int, outer: int, kernel: int) -> None:
        super().__init__()
        plain = nn.Conv1d(inner, outer, kernel)
        self.bias = plain.bias
        self.weight_orig = plain.weight
        self.register_buffer("weight_u", F.normalize(torch.randn(outer), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(inner * kernel), dim=0, eps=1e-12))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, N) -> (B, outer, N)."""
        rows = self.weight_orig.flatten(1)
        if self.training:
            with torch.no_grad():
                self.weight_v = F.normalize(rows.T @ self.weight_u, dim=0, eps=1e-12)
                self.weight_u = F.normalize(rows @ self.weight_v, dim=0, eps=1e-12)
        weight = self.weight_orig / torch.dot(self.weight_u, rows @ self.weight_v)
        pad = weight.shape[-1] // 2
        return F.conv1d(F.pad(x, (pad, pad), mode="circular") if pad else x, weight, self.bias)


class Residual(nn.Module):
    """(f(x) + x) / sqrt 2."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that f keeps."""
        return (self.fn(x) + x) * 0.5**0.5


def _block(kernel: int) -> nn.Sequential:
    return nn.Sequential(SpectralConv1d(WIDTH, WIDTH, kernel), LocalBatchNorm1d(WIDTH), nn.LeakyReLU(0.2))


@register("loss", "dino_discriminator")
class DinoDiscriminator(nn.Module):
    """Heads on five read-outs of a frozen DINO ViT-S/16, after differentiable augmentation.

    From the public code of VAR's tokenizer (arXiv 2404.02905, a small StyleGAN-T discriminator, arXiv 2301.09515) and
    GigaTok (arXiv 2504.08736), whose B-L "dino disc" tokenizer it trained from step 80 000 with hinge loss at weight
    0.5. The heads have the published keys (`heads.*`); the trunk is frozen and not saved. Pictures larger than 224
    pixels are, in training, cut to one random 224 crop for the whole batch with probability `crops`, else shrunk by
    area averages; smaller ones are enlarged bicubically. The norm in the heads is local to a process as published, the
    one exception to "two processes of b equal one of 2b". The published code crops with Python's random numbers also
    in evaluation; here evaluation never crops nor augments.

    Args:
        read_outs: Blocks after which features are read, besides those after the embedding.
        kernel: Width of the second convolution of a head, in tokens of the raster.
        crops: Probability of a crop.
        augment: Probability of each group of augmentations, see `DiffAugment`.
        cutout: Side that cutout removes, over that of the picture.
        weights: DINO's weights; None looks for asset `dino_vits16`, see `vistok.assets.find`.

    Raises:
        AssetError: No weights on this machine, or others; the message lists where they can come from.
    """

    trunk: DinoTrunk

    def __init__(
        self,
        *,
        read_outs: tuple[int, ...] = (2, 5, 8, 11),
        kernel: int = 9,
        crops: float = 0.5,
        augment: float = 1.0,
        cutout: float = 0.2,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        self.crops = crops
        self.augment = DiffAugment(probability=augment, cutout=cutout)
        # Beside the module tree: what wraps, saves, averages or guards the discriminator need not carry 86 MB that
        # never change.
        self.__dict__["trunk"] = DinoTrunk(tuple(read_outs), weights)
        self.heads = nn.ModuleList(
            nn.Sequential(_block(1), Residual(_block(kernel)), SpectralConv1d(WIDTH, 1, 1))
            for _ in range(len(read_outs) + 1)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DinoDiscriminator:
        """What `.to(...)` calls; the trunk goes along."""
        self.trunk._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> logits (B, 196 x (read-outs + 1)), 980 as published."""
        seen = self._fit(self.augment(2.0 * images - 1.0))
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, self.trunk(seen))], 1)

    def _fit(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.training and min(height, width) > SIZE and float(torch.rand(())) < self.crops:
            top, left = (int(torch.randint(side - SIZE + 1, ())) for side in (height, width))
            return images[..., top : top + SIZE, left : left + SIZE]
        return F.interpolate(images, size=(SIZE, SIZE), mode="area" if height > SIZE else "bicubic")
