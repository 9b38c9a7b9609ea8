"""Discriminators: pictures in [0, 1], (B, 3, H, W), to logits of any shape that starts with B; high means real.

They are registered as kind `loss` and are trained by the step that holds them, unlike the frozen losses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.registry import register


class BlurDownsample(nn.Module):
    """Low-pass [1, 3, 3, 1] in both directions, then every second pixel; zero padding as TensorFlow's `same`."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / 64.0)[None, None])  # (1, 1, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, h, w) at half the size, rounded up."""
        channels = x.shape[1]
        # `same` for width 4 and stride 2: one pixel before, one behind, two behind if the side is odd
        x = F.pad(x, (1, 1 + x.shape[-1] % 2, 1, 1 + x.shape[-2] % 2))
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, -1, -1, -1), stride=2, groups=channels)


@register("loss", "titok_discriminator")
class TiTokDiscriminator(nn.Module):
    """TiTok's patch discriminator: blurred down-sampling, group norm, 16 x 16 logits.

    From the official code of arXiv 2406.07550 (an open-MUSE design; the papers do not describe it). Its state dict has
    the official keys. It takes pictures in [0, 1] as they are.

    Args:
        width: Channels of the first stage.
        stages: Number of stages; stage i has width * 2^i channels, at most 8 times the width.
        grid: Side of the logit map, whatever the picture's size.
    """

    def __init__(self, *, width: int = 128, stages: int = 3, grid: int = 16) -> None:
        super().__init__()
        self.grid = grid
        self.block_in = nn.Sequential(nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(0.1))
        blocks, inner = [], width
        for i in range(stages):
            outer = width * min(2**i, 8)
            conv = nn.Conv2d(inner, outer, 3, padding=1)
            blocks.append(nn.Sequential(conv, BlurDownsample(), nn.GroupNorm(32, outer), nn.LeakyReLU(0.1)))
            inner = outer
        self.blocks = nn.ModuleList(blocks)
        self.to_logits = nn.Sequential(nn.Conv2d(inner, inner, 1), nn.LeakyReLU(0.1), nn.Conv2d(inner, 1, 5, padding=2))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> logits (B, 1, grid, grid)."""
        x = self.block_in(images)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(F.adaptive_max_pool2d(x, self.grid))
