"""MaskGIT-VQGAN: the convolutional tokenizer whose codes two-stage TiTok predicts (arXiv 2202.04200)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.config import Of, Spec, create
from vistok.hub import on_meta
from vistok.image import Preprocess
from vistok.layers.attention import float32_linear
from vistok.layers.conv import GroupNormSiLU, UpsampleConv2d, pad_to_multiple, to_map, to_sequence
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer

MULTIPLIERS = (1, 1, 2, 2, 4)
BLOCKS = 2


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions without bias, each after group norm and SiLU.

    Where the channels change, the official code applies the 1x1 shortcut to the block's own *output* and adds it to
    that output: the input is not added. The published weights were trained so.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int = 32) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = (
            nn.Conv2d(out_channels, out_channels, 1, bias=False) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h, w)."""
        out = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return out + (x if self.nin_shortcut is None else self.nin_shortcut(out))


class _Level(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, *, groups: int, upsample: bool = False) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * BLOCKS
        self.block = nn.ModuleList(ResidualBlock(a, b, groups=groups) for a, b in pairwise(widths))
        self.upsample_conv = UpsampleConv2d(out_channels, out_channels) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample_conv is not None:
            x = self.upsample_conv(x)
        return x


class MaskGITEncoder(nn.Module):
    """Pictures to features on a grid 16 times coarser.

    Args:
        out_channels: Channels of the features.
        channels: Width of the finest level; a multiple of `groups`.
        groups: Groups of the norms.
    """

    def __init__(self, out_channels: int, *, channels: int = 128, groups: int = 32) -> None:
        super().__init__()
        widths = [channels * m for m in MULTIPLIERS]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(_Level(a, b, groups=groups) for a, b in zip([channels, *widths], widths))
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], groups=groups) for _ in range(BLOCKS))
        self.norm_out = GroupNormSiLU(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> float32 features (B, H/16 * W/16, out_channels)."""
        x = self.conv_in(images.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last))
        for i, level in enumerate(self.down):
            x = level(x)
            if i < len(self.down) - 1:
                x = F.avg_pool2d(x, 2)
        for block in self.mid:
            x = block(x)
        return float32_linear(to_sequence(self.norm_out(x)), self.conv_out)


class MaskGITDecoder(nn.Module):
    """Codes on a grid to pictures 16 times finer, in channels-last memory (a third faster on CPU).

    Args:
        in_channels: Channels of the codes.
        channels: Width of the finest level; a multiple of `groups`.
        groups: Groups of the norms.
    """

    def __init__(self, in_channels: int, *, channels: int = 128, groups: int = 32) -> None:
        super().__init__()
        widths = [channels * m for m in MULTIPLIERS]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], groups=groups) for _ in range(BLOCKS))
        above = [*widths[1:], widths[-1]]  # level i is entered with the width of the next coarser one
        self.up = nn.ModuleList(_Level(above[i], widths[i], groups=groups, upsample=i > 0) for i in range(len(widths)))
        self.norm_out = GroupNormSiLU(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> pictures around [0, 1], unclamped, (B, 3, 16 h, 16 w)."""
        return self.layers(x.contiguous(memory_format=torch.channels_last))

    def layers(self, x: Tensor) -> Tensor:
        """The convolutions alone, in whatever memory layout x has."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


@register("tokenizer", "maskgit_vqgan")
class MaskGITVQGAN(Tokenizer):
    """MaskGIT's VQGAN: one token per 16x16 pixels, convolutional; pictures of any size, padded to multiples of 16.

    Args:
        image_size: Side in pixels, or (H, W), that picture files are cropped to; multiples of 16.
        codebook_size: Codes, V.
        code_dim: Channels of a code.
        channels: Width of the finest level; a multiple of `groups`.
        groups: Groups of the norms; 32 in the published weights. With as many groups as channels the mean colour of a
            picture is normalised away: a narrow model needs fewer.
        quantizer: Any registered quantizer instead of the published one (`vq` with the two numbers above).
    """

    options = frozenset({"size"})
    decoder_parts = ("decoder",)
    multiple = 16

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        codebook_size: int = 1024,
        code_dim: int = 256,
        channels: int = 128,
        groups: int = 32,
        quantizer: Annotated[Spec | None, Of("quantizer")] = None,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"image_size {height}x{width} is not a multiple of {self.multiple}.")
        self.preprocess = Preprocess(size=(height, width))
        spec = quantizer or {"name": "vq", "codebook_size": codebook_size, "dim": code_dim}
        width_of: Any = on_meta("quantizer", **spec)
        self.encoder = MaskGITEncoder(width_of.in_dim, channels=channels, groups=groups)
        self.quantizer = create("quantizer", **spec)  # after the encoder: the order in which runs draw their weights
        self.decoder = MaskGITDecoder(self.quantizer.dim, channels=channels, groups=groups)
        grid = self.grid_for((height, width))
        self.num_tokens = self.quantizer.num_ids(grid[0] * grid[1], grid)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.conv_out.weight

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """One token per 16x16 pixels, a started one counts."""
        return (-(-size[0] // self.multiple), -(-size[1] // self.multiple))

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, ceil(H/16) * ceil(W/16), quantizer.in_dim), float32."""
        return self.encoder(pad_to_multiple(images, self.multiple))

    def decode_codes(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes (B, h * w, quantizer.dim) -> pictures, unclamped, (B, 3, 16 h, 16 w)."""
        return self.decoder(
            to_map(codes.to(self.decoder.conv_in.weight.dtype), grid or self.grid_for(self.preprocess.size))
        )


preset(
    "tokenizer",
    "maskgit_vqgan_tiny",
    builder="maskgit_vqgan",
    config={"image_size": 64, "codebook_size": 64, "code_dim": 8, "channels": 32},
)
