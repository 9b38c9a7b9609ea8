"""Convolutional building blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNormSiLU(nn.GroupNorm):
    """Group normalisation followed by SiLU in place."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        return F.silu(super().forward(x), inplace=not torch.is_grad_enabled())


class UpsampleConv2d(nn.Conv2d):
    """Nearest x2 upsampling followed by a 3x3 convolution, computed on the small map.

    Each of the four pixels that a small pixel becomes sees only 2x2 small pixels, so four 2x2 convolutions with summed
    weights give the same result with 4/9 of the multiplications and without the large intermediate map.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, 2 h, 2 w)."""
        w = self.weight
        rows = torch.stack(
            [
                torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2),
                torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2),
            ]
        )
        first, middle, last = rows.unbind(-1)  # 3 x (2 row phases, out, in, 2)
        taps = torch.stack([torch.stack([first, middle + last], -1), torch.stack([first + middle, last], -1)], 1)
        kernel = taps.flatten(0, 2).contiguous(memory_format=torch.channels_last)  # (4 out, in, 2, 2)
        bias = None if self.bias is None else self.bias.repeat(4)
        phases = F.conv2d(x, kernel, bias, padding=1).unflatten(1, (2, 2, -1))  # (B, 2, 2, out, h + 1, w + 1)
        h, width = x.shape[-2:]
        out = x.new_empty(x.shape[0], 2 * h, 2 * width, self.out_channels, dtype=phases.dtype).permute(0, 3, 1, 2)
        for i in (0, 1):
            for j in (0, 1):
                out[:, :, i::2, j::2] = phases[:, i, j, :, i : i + h, j : j + width]
        return out


def to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, h * w, D), row-major, as a feature map (B, D, h, w) in channels-last memory; copies nothing."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def to_sequence(x: Tensor) -> Tensor:
    """A feature map (B, D, h, w) as tokens (B, h * w, D), row-major."""
    return x.flatten(2).transpose(1, 2)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pictures (B, 3, H, W) with their last rows and columns repeated until both sides are multiples of `multiple`."""
    down, right = -images.shape[-2] % multiple, -images.shape[-1] % multiple
    return F.pad(images, (0, right, 0, down), mode="replicate") if down or right else images


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift per channel come from mean and deviation of a style map (WeTok, GigaTok).

    y = GN(x) * gamma(std(style)) + beta(mean(style)): no 1 + in front of the scale, and std is sqrt(var + eps) with the
    unbiased variance over positions, float32. Where a map has one position the official variance is NaN; it is 0 here.

    Args:
        channels: Channels of x, C; a multiple of `groups`.
        style: Channels of the style map.
        groups: Groups of the norm.
        eps: Epsilon of norm and deviation.
    """

    def __init__(self, channels: int, style: int, groups: int = 32, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.GroupNorm(groups, channels, eps=eps, affine=False)
        self.gamma = nn.Linear(style, channels)
        self.beta = nn.Linear(style, channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Normalise x (B, C, h, w) under a style map (B, style, h', w')."""
        positions = style.float().flatten(2)  # (B, style, h' * w')
        variance = positions.var(2, correction=min(1, positions.shape[2] - 1))
        dtype = self.gamma.weight.dtype
        scale = self.gamma((variance + self.eps).sqrt().to(dtype))
        shift = self.beta(positions.mean(2).to(dtype))
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class DepthToSpaceConv2d(nn.Module):
    """A 3x3 convolution to 4 C channels, which become 2x2 pixels: channel (i * 2 + j) * C + c goes to pixel (i, j).

    `nn.PixelShuffle` counts the other way round (c * 4 + i * 2 + j), so weights cannot be exchanged.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
        parts = self.conv1(x).unflatten(1, (2, 2, -1))  # (B, 2, 2, C, h, w)
        return parts.permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)
