"""Convolutional halves of VQGAN-like models with biases everywhere: pictures to a map, a map to pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from vistok.layers.conv import AdaptiveGroupNorm, GroupNormSiLU

EPS = 1e-6


class ResBlock(nn.Module):
    """Norm, SiLU and 3x3 convolution twice; a 1x1 convolution on the way around where the width changes."""

    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, inner, eps=EPS)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = GroupNormSiLU(groups, outer, eps=EPS)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, h, w) -> (B, outer, h, w)."""
        return self.shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class ShrinkConv2d(nn.Conv2d):
    """3x3 convolution of stride 2 that pads below and at the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / 2, w / 2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class GrowConv2d(nn.Conv2d):
    """3x3 convolution to 4 C channels, then depth to space with the place in the 2x2 block as the slow channel index.

    (`torch.nn.PixelShuffle` has it as the fast one: weights are not interchangeable.)
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
        x = super().forward(x).unflatten(1, (2, 2, -1))  # (B, 2, 2, C, h, w)
        return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class PictureEncoder(nn.Module):
    """Pictures to a map of 1 / 2^(levels - 1) their side.

    Args:
        channels: Base width, a multiple of `groups`.
        multipliers: Width of each level over `channels`, fine to coarse.
        out: Channels of the map.
        blocks: Residual blocks per level.
        groups: Groups of the norms.
    """

    def __init__(self, channels: int, multipliers: Sequence[int], out: int, blocks: int = 2, groups: int = 32) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels, width = nn.ModuleList(), channels
        for i, multiplier in enumerate(multipliers):
            outer = channels * multiplier
            level = nn.ModuleDict(
                {"blocks": nn.Sequential(*(ResBlock(width if j == 0 else outer, outer, groups) for j in range(blocks)))}
            )
            if i < len(multipliers) - 1:
                level["shrink"] = ShrinkConv2d(outer)
            self.levels.append(level)
            width = outer
        self.middle = nn.Sequential(ResBlock(width, width, groups), ResBlock(width, width, groups))
        self.norm_out = GroupNormSiLU(groups, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, out, h, w)."""
        x = self.conv_in(images.to(self.conv_in.weight.dtype))
        for level in self.levels:
            x = level["blocks"](x)  # type: ignore[index]
            x = level["shrink"](x) if "shrink" in level else x  # type: ignore[index,operator]
        return self.conv_out(self.norm_out(self.middle(x)))


class PictureDecoder(nn.Module):
    """A map to pictures of 2^(levels - 1) its side, normalised adaptively by the map itself.

    Args:
        channels: Base width, a multiple of `groups`.
        multipliers: Width of each level over `channels`, fine to coarse.
        inner: Channels of the map.
        blocks: Residual blocks per level.
        groups: Groups of the norms.
    """

    def __init__(
        self, channels: int, multipliers: Sequence[int], inner: int, blocks: int = 3, groups: int = 32
    ) -> None:
        super().__init__()
        width = channels * multipliers[-1]
        self.conv_in = nn.Conv2d(inner, width, 3, padding=1)
        self.middle = nn.Sequential(ResBlock(width, width, groups), ResBlock(width, width, groups))
        self.levels = nn.ModuleList()
        for i, multiplier in enumerate(reversed(multipliers)):
            outer = channels * multiplier
            level = nn.ModuleDict(
                {
                    "adapt": AdaptiveGroupNorm(width, inner, groups, eps=EPS),
                    "blocks": nn.Sequential(
                        *(ResBlock(width if j == 0 else outer, outer, groups) for j in range(blocks))
                    ),
                }
            )
            if i < len(multipliers) - 1:
                level["grow"] = GrowConv2d(outer)
            self.levels.append(level)
            width = outer
        self.norm_out = GroupNormSiLU(groups, width, eps=EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, inner, h, w) -> (B, 3, H, W)."""
        features = features.to(self.conv_in.weight.dtype)
        x = self.middle(self.conv_in(features))
        for level in self.levels:
            x = level["blocks"](level["adapt"](x, features))  # type: ignore[index]
            x = level["grow"](x) if "grow" in level else x  # type: ignore[index,operator]
        return self.conv_out(self.norm_out(x))
