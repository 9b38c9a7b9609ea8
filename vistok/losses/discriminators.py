"""Discriminators: pictures in [0, 1], (B, 3, H, W), to logits of any shape that starts with B; high means real.

They are registered as kind `loss` and are trained by the step that holds them, unlike the frozen losses. The one on
frozen DINO features is in `vistok.losses.dino`.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.norm import AllReduceBatchNorm2d
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


@register("loss", "patchgan_discriminator")
class PatchGanDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004, section 6.1.2): one logit per patch of 70 x 70 pixels, batch norm.

    State dict, order of layers and initial weights are those of taming-transformers' `NLayerDiscriminator` (VQGAN,
    arXiv 2012.09841), which GigaTok, WeTok and many others use: convolutions N(0, 0.02) with torch's biases, batch norm
    N(1, 0.02) with bias 0; the pix2pix code starts biases at 0. In the published trainings batch norm is local to a
    process; here it is over the joint batch, so that two processes of b equal one of 2b.

    Args:
        width: Channels of the first layer, doubled by every further one up to 8 times.
        layers: Layers that halve the side; the receptive field is 16, 34, 70, 142 pixels for 1 to 4.
    """

    def __init__(self, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.least = 3 * 2**layers
        main: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        inner = width
        for i in range(1, layers + 1):
            outer = width * min(2**i, 8)
            conv = nn.Conv2d(inner, outer, 4, stride=2 if i < layers else 1, padding=1, bias=False)
            main += [conv, AllReduceBatchNorm2d(outer), nn.LeakyReLU(0.2)]
            inner = outer
        self.main = nn.Sequential(*main, nn.Conv2d(inner, 1, 4, padding=1))
        self.apply(_narrow_start)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> logits (B, 1, h, w), 30 x 30 for 256 x 256 pixels and three layers.

        Raises:
            ValueError: Pictures too small to leave a logit.
        """
        if min(images.shape[-2:]) < self.least:
            raise ValueError(
                f"This discriminator takes pictures of at least {self.least} x {self.least} pixels and got "
                f"{images.shape[-2]} x {images.shape[-1]}. Build it with fewer layers."
            )
        return self.main(2.0 * images - 1.0)


@torch.no_grad()
def _narrow_start(module: nn.Module) -> None:
    """The initial weights of DCGAN, pix2pix and VQGAN."""
    if isinstance(module, nn.Conv2d):
        module.weight.normal_(0.0, 0.02)
    elif isinstance(module, AllReduceBatchNorm2d):
        module.weight.normal_(1.0, 0.02)
        module.bias.zero_()


class ScaledConv2d(nn.Module):
    """Convolution without bias whose weight is N(0, 1) and scaled to unit gain when it is used (StyleGAN's)."""

    def __init__(self, inner: int, outer: int, kernel: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outer, inner, kernel, kernel))
        self.gain, self.stride, self.padding = (inner * kernel**2) ** -0.5, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, inner, h, w) -> (B, outer, h', w')."""
        return F.conv2d(x, self.weight * self.gain, stride=self.stride, padding=self.padding)


class ScaledLinear(nn.Module):
    """Linear layer with a weight as in `ScaledConv2d` and, if asked, StyleGAN's activation behind."""

    def __init__(self, inner: int, outer: int, *, active: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outer, inner))
        self.bias = nn.Parameter(torch.zeros(outer))
        self.gain, self.active = inner**-0.5, active

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner) -> (B, outer)."""
        x = F.linear(x, self.weight * self.gain, self.bias)
        return _unit_leaky_relu(x) if self.active else x


def _unit_leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2.0)


class Activation(nn.Module):
    """Bias, leaky ReLU of slope 0.2, times sqrt 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, h, w)."""
        return _unit_leaky_relu(x + self.bias[:, None, None])


class LowPass(nn.Module):
    """Low-pass [1, 3, 3, 1] in both directions over a map padded with zeros, every `stride`-th pixel of it."""

    kernel: Tensor

    def __init__(self, padding: int, *, stride: int = 1) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", taps[:, None] * taps / 64.0)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, h, w), smoothed."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=x.shape[1])


class ResidualDown(nn.Module):
    """StyleGAN2's residual block: two 3 x 3 convolutions, the second with stride 2; a 1 x 1 short cut; over sqrt 2."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(ScaledConv2d(inner, inner, 3, padding=1), Activation(inner))
        self.conv2 = nn.Sequential(LowPass(2), ScaledConv2d(inner, outer, 3, stride=2), Activation(outer))
        # the port takes every second pixel in the 1 x 1 convolution; the same, at four times the cost
        self.skip = nn.Sequential(LowPass(1, stride=2), ScaledConv2d(inner, outer, 1))

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, inner, h, w) -> (B, outer, h / 2, w / 2)."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) * math.sqrt(0.5)


def group_deviation(x: Tensor, group: int) -> Tensor:
    """Standard deviation over groups of samples, averaged over channels and positions: (B, C, h, w) -> (B, 1, h, w).

    StyleGAN's minibatch statistic (Karras et al., arXiv 1710.10196, section 3). Groups are made of samples of one
    process that lie B / group apart; where the batch does not divide, it is one group.
    """
    size = group if len(x) % group == 0 else len(x)
    parts = x.float().unflatten(0, (size, -1))  # (size, B / size, C, h, w)
    deviation = (parts.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
    return deviation.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:]).to(x.dtype)


@register("loss", "stylegan_discriminator")
class StyleGanDiscriminator(nn.Module):
    """The residual discriminator of StyleGAN2 (Karras et al., arXiv 1912.04958, appendix B): one logit per picture.

    At 256 pixels it has the 24 M parameters that TexTok (arXiv 2412.05796) gives for its StyleGAN discriminator, whose
    code and settings are not public. Keys are those of the usual PyTorch port, whose `conv2` and `skip` smooth before
    the strided convolution. The paper's statistic over the minibatch sees only one process, so it is off unless asked
    for (`group`); MaskGIT's port, which tokenizers started from, has none either. LlamaGen's and GigaTok's optional
    StyleGAN discriminator is another network (three convolutions per block, 36.5 M parameters, plain weights).
    StyleGAN2 trains with the non-saturating loss and R1, gamma 10 at 1024 pixels, every 16 steps
    (`train.step.r1_gamma`, `r1_every`); no tokenizer project publishes a gamma.

    Args:
        image_size: Side of the square pictures, a power of two.
        channels: Channels at a side of 1 pixel: a map of side s has channels / s, at most `widest`. The paper's large
            network has twice as many.
        widest: Most channels.
        group: Samples in a group of the minibatch statistic, 4 in the paper; 0 for none.

    Raises:
        ValueError: The side is no power of two from 8 on.
    """

    def __init__(self, *, image_size: int = 256, channels: int = 16384, widest: int = 512, group: int = 0) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"image_size: a power of two from 8 on, got {image_size}.")
        self.image_size, self.group = image_size, group
        sides = [image_size >> i for i in range(image_size.bit_length() - 2)]  # 256 ... 4
        widths = [min(widest, channels // side) for side in sides]
        first, last = nn.Sequential(ScaledConv2d(3, widths[0], 1), Activation(widths[0])), widths[-1]
        self.convs = nn.Sequential(first, *(ResidualDown(i, o) for i, o in itertools.pairwise(widths)))
        self.final_conv = nn.Sequential(ScaledConv2d(last + bool(group), last, 3, padding=1), Activation(last))
        self.final_linear = nn.Sequential(
            ScaledLinear(last * 16, last, active=True), ScaledLinear(last, 1, active=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> logits (B, 1).

        Raises:
            ValueError: Pictures of another size.
        """
        size = tuple(images.shape[-2:])
        if size != (self.image_size, self.image_size):
            raise ValueError(
                f"This discriminator is built for {self.image_size} x {self.image_size} pixels and got {size[0]} x "
                f"{size[1]}. Set its image_size."
            )
        x = self.convs(2.0 * images - 1.0)  # (B, last, 4, 4)
        if self.group:
            x = torch.cat([x, group_deviation(x, self.group)], 1)
        return self.final_linear(self.final_conv(x).flatten(1))
