"""WeTok: convolutional tokenizer with grouped look-up free codes and, optionally, a generative decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.hub import load_strictly
from vistok.image import Preprocess
from vistok.layers.attention import float32_linear
from vistok.layers.conv import (
    AdaptiveGroupNorm,
    DepthToSpaceConv2d,
    GroupNormSiLU,
    pad_to_multiple,
    to_map,
    to_sequence,
)
from vistok.quantizers.base import Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer

FIXED_NOISE = 0
"""Seed of the noise that a generative decoder gets where nobody gives any."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions without bias, each after group norm and SiLU; a 1x1 short cut where channels change."""

    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, inner, eps=1e-6)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.norm2 = GroupNormSiLU(groups, outer, eps=1e-6)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inner, h, w) -> (B, outer, h, w)."""
        out = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return out + (x if self.nin_shortcut is None else self.nin_shortcut(x))


def _blocks(inner: int, outer: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise([inner] + [outer] * count))


class _Level(nn.Module):
    """Residual blocks of one resolution and the way to the next one, a module called `step` in the state dict."""

    def __init__(
        self, inner: int, outer: int, count: int, groups: int, step: str = "", module: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block = _blocks(inner, outer, count, groups)
        self.step = "" if module is None else step
        if module is not None:
            self.add_module(step, module)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if not self.step else self.get_submodule(self.step)(x)


class WeTokEncoder(nn.Module):
    """Pictures to features, which are the latents before their signs are taken: unbounded and not normalised.

    Args:
        out_channels: Channels of the features.
        widths: Channels of every level, the finest first; multiples of `groups`. Each level but the last halves both
            sides.
        blocks: Residual blocks per level.
        groups: Groups of the norms.
    """

    def __init__(self, out_channels: int, widths: Sequence[int], blocks: int, groups: int = 32) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        levels = []
        for i, (inner, outer) in enumerate(pairwise([widths[0], *widths])):
            down = nn.Conv2d(outer, outer, 3, stride=2, padding=1) if i < len(widths) - 1 else None
            levels.append(_Level(inner, outer, blocks, groups, "downsample", down))
        self.down = nn.ModuleList(levels)
        self.mid_block = _blocks(widths[-1], widths[-1], blocks, groups)
        self.norm_out = GroupNormSiLU(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> float32 features (B, h * w, out_channels)."""
        x = (2.0 * images - 1.0).to(self.conv_in.weight.dtype)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for level in self.down:
            x = level(x)
        for block in self.mid_block:
            x = block(x)
        return float32_linear(to_sequence(self.norm_out(x)), self.conv_out)


class WeTokDecoder(nn.Module):
    """Codes on a grid to pictures; the codes' statistics style every level. Levels are numbered from the finest.

    Args:
        in_channels: Channels of the codes.
        widths: Channels of every level, the finest first; multiples of `groups`.
        blocks: Residual blocks per level.
        groups: Groups of the norms.
        generative: Whether as many channels of noise go in beside the codes (they do not style).
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], blocks: int, groups: int = 32, *, generative: bool = False
    ) -> None:
        super().__init__()
        self.generative = generative
        self.conv_in = nn.Conv2d(in_channels * (1 + generative), widths[-1], 3, padding=1)
        self.mid_block = _blocks(widths[-1], widths[-1], blocks, groups)
        entered = [*widths[1:], widths[-1]]  # level i is entered with the width of the next coarser one
        levels = []
        for i, (inner, outer) in enumerate(zip(entered, widths)):
            up = DepthToSpaceConv2d(outer) if i else None
            levels.append(_Level(inner, outer, blocks, groups, "upsample", up))
        self.up = nn.ModuleList(levels)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(width, in_channels, groups) for width in entered)
        self.norm_out = GroupNormSiLU(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, codes: Tensor, noise: Tensor | None = None) -> Tensor:
        """Codes, and noise of the same shape if generative, (B, in_channels, h, w) -> pictures around [0, 1]."""
        dtype = self.conv_in.weight.dtype
        x = (codes if noise is None else torch.cat([codes, noise.to(codes.dtype)], dim=1)).to(dtype)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.mid_block:
            x = block(x)
        for level, adapt in zip(reversed(self.up), reversed(self.adaptive)):
            x = level(adapt(x, codes))
        return 0.5 * self.conv_out(self.norm_out(x)) + 0.5


@register("tokenizer", "wetok")
class WeTok(Tokenizer):
    """WeTok (arXiv 2508.05599): one token of several groups of bits per patch; pictures of any size.

    Picture files are cropped to `image_size`; tensors keep their size, and so do files under
    `tok.preprocess = Preprocess(crop="none")`. Sides that are no multiple of the factor are padded, and cropped back.

    The generative decoder (the second stage of training, which `start_from` prepares) takes noise beside the codes. The
    released code draws it anew in every call. Here it is given as `noise`, (B, D, h, w), or drawn from `generator`;
    without both, training draws and evaluation uses one fixed map for every picture, so that decoding is a function of
    the tokens alone.

    Args:
        image_size: Side in pixels, or (H, W), that picture files are cropped to.
        channels: Width of the finest level; a multiple of `groups`.
        multipliers: Width of each level over `channels`, the finest first; n levels make a factor of 2^(n - 1).
        blocks: Residual blocks per level.
        quantizer: Any registered quantizer; the published one is `group_lfq` with 8 bits a group.
        generative: Whether the decoder takes noise.
        groups: Groups of the norms, 32 as published. Groups of one channel take the mean colour out of small models.

    Example:
        >>> tok = vistok.create("tokenizer", "wetok_r192.general")
        >>> tok.encode(torch.rand(1, 3, 200, 300)).grid
        (13, 19)
    """

    options = frozenset({"size", "generator", "noise"})

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        channels: int = 256,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 4,
        quantizer: Annotated[Spec, Of("quantizer")],
        generative: bool = False,
        groups: int = 32,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        widths = [channels * m for m in multipliers]
        if not widths or min(widths) < 1 or groups < 1 or any(w % groups for w in widths) or blocks < 1:
            raise ValueError(
                f"Every level needs a width that is a multiple of the {groups} groups and at least one block, got "
                f"widths {widths} and {blocks} blocks."
            )
        self.multiple = 2 ** (len(widths) - 1)
        self.preprocess = Preprocess(size=size)
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        grid = self.grid_for(size)
        self.num_tokens = self.quantizer.num_ids(grid[0] * grid[1], grid)
        self.encoder = WeTokEncoder(self.quantizer.in_dim, widths, blocks, groups)
        self.decoder = WeTokDecoder(self.quantizer.dim, widths, blocks, groups, generative=generative)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.conv_out.weight

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """One token per patch, a started one counts."""
        assert self.multiple is not None
        return (-(-size[0] // self.multiple), -(-size[1] // self.multiple))

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, h * w, quantizer.in_dim), float32."""
        assert self.multiple is not None
        return self.encoder(pad_to_multiple(images, self.multiple))

    def decode_codes(
        self,
        codes: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Codes (B, h * w, quantizer.dim) -> pictures, unclamped, (B, 3, h * factor, w * factor).

        Raises:
            ValueError: Noise of another shape, or for a decoder that takes none, or noise beside a generator.
        """
        at = to_map(codes, grid or self.grid_for(self.preprocess.size))  # (B, D, h, w)
        return self.decoder(at, self._noise(at, generator, noise))

    def _noise(self, codes: Tensor, generator: torch.Generator | None, noise: Tensor | None) -> Tensor | None:
        if not self.decoder.generative:
            if noise is not None:
                raise ValueError("This decoder takes no noise. Build the model with generative=true.")
            return None
        if noise is not None:
            if generator is not None or noise.shape != codes.shape:
                raise ValueError(
                    f"Noise is {tuple(codes.shape)}, without a generator beside it; got {tuple(noise.shape)}."
                )
            return noise.to(codes.device)
        if generator is not None or self.training:
            return torch.randn(codes.shape, generator=generator, device=codes.device)
        fixed = torch.randn(codes.shape[1:], generator=torch.Generator().manual_seed(FIXED_NOISE))
        return fixed.to(codes.device).expand(codes.shape)

    def start_from(self, other: Tokenizer, source: str) -> None:
        """Take another model's weights; a decoder without noise gets zeros for the noise, so that it starts unchanged.

        Raises:
            LoadError: Weights that do not fit.
        """
        state, key = other.state_dict(), "decoder.conv_in.weight"
        if self.decoder.generative and isinstance(other, WeTok) and not other.decoder.generative:
            state[key] = torch.cat([state[key], torch.zeros_like(state[key])], dim=1)
        load_strictly(self, state, source)


_TINY = {
    "image_size": 32,
    "channels": 32,
    "multipliers": (1, 1, 2, 2),
    "blocks": 1,
    "quantizer": {"name": "group_lfq", "dim": 16, "groups": 2},
}
preset("tokenizer", "wetok_tiny", builder="wetok", config=_TINY)
preset("tokenizer", "wetok_generative_tiny", builder="wetok", config={**_TINY, "generative": True})
