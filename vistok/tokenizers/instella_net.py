"""Instella's transformers: latent and picture tokens in one sequence, one change of resolution."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vistok.layers.attention import float32_linear
from vistok.layers.conv import to_map, to_sequence
from vistok.layers.mlp import SwiGLU

Grid = tuple[int, int]
THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of one of the two transformers.

    Attributes:
        depth: Number of blocks.
        heads: Attention heads.
        head_dim: Channels of a head; the width is heads * head_dim.
        resize_after: Block (from 0) behind which picture tokens become four times fewer (encoder) or more (decoder).
    """

    depth: int
    heads: int
    head_dim: int = 64
    resize_after: int = 7

    @property
    def width(self) -> int:
        """Width, D."""
        return self.heads * self.head_dim


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, eps 1e-6; the weight acts in the input's precision."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> the same shape."""
        return F.rms_norm(x.float(), self.weight.shape, eps=1e-6).to(x.dtype) * self.weight


def axis_positions(count: int, span: int | None) -> Tensor:
    """Positions of a side of `count` tokens: 0..count-1, or spread over 0..span-1 whatever the count, float32."""
    places = torch.arange(count, dtype=torch.float32)
    return places if span is None else places / max(count - 1, 1) * (span - 1)


@functools.lru_cache(maxsize=32)
def rotary_table(latents: int, grid: Grid, span: int | None, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of latent tokens (i, 0, 0) and picture tokens (0, row, column), 2 x (latents + h * w, d).

    The released table repeats every angle twice in a row (c0, c0, c1, c1, ...) and is used by the half-split rule, see
    `rotate`: what looks like a rotation is none, and published weights need it as it is.

    Args:
        latents: Number of latent tokens, K.
        grid: (h, w) of the picture tokens.
        span: See `axis_positions`.
        axes: Channels of each of the three axes; their sum is the head's width, d.
    """
    first = torch.zeros(latents, 3)
    first[:, 0] = torch.arange(latents, dtype=torch.float32)
    rows, columns = torch.meshgrid(axis_positions(grid[0], span), axis_positions(grid[1], span), indexing="ij")
    rest = torch.stack([torch.zeros(rows.numel()), rows.flatten(), columns.flatten()], dim=1)
    places = torch.cat([first, rest]).double()  # (K + h * w, 3)
    angles = [
        places[:, i : i + 1] * THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        for i, width in enumerate(axes)
    ]
    table = torch.cat([a.repeat_interleave(2, dim=1) for a in angles], dim=1)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rule: x (B, A, N, d) times cos plus (-second half, first half) times sin, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class RotaryAttention(nn.Module):
    """Self-attention with normed, rotated queries and keys; no biases.

    Args:
        heads: Number of heads.
        head_dim: Channels of a head.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, width = heads, heads * head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm_q = RMSNorm(head_dim)
        self.norm_k = RMSNorm(head_dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, A, N, d)
        q, k = rotate(self.norm_q(q), *rotary), rotate(self.norm_k(k), *rotary)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: rotary attention, then a gated perceptron of four times the width without biases."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(heads, head_dim)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, 4 * width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class Halve(nn.Module):
    """Half the resolution: a strided 3x3 convolution plus the mean of 2x2 (the residual block of DC-AE)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h / 2, w / 2)."""
        return self.conv(x) + F.avg_pool2d(x, 2)


class Double(nn.Module):
    """Twice the resolution: a 3x3 convolution with pixel shuffle plus the nearest neighbour."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, 2 h, 2 w)."""
        return F.pixel_shuffle(self.conv(x), 2) + F.interpolate(x, scale_factor=2, mode="nearest")


class TwoScales(nn.Module):
    """Blocks over [latents, picture tokens]; behind one of them the picture tokens change their resolution.

    Args:
        size: Shape.
        resize: `Halve` or `Double`.
        axes: See `rotary_table`.

    Attributes:
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
    """

    def __init__(self, size: Size, resize: nn.Module, axes: Sequence[int]) -> None:
        super().__init__()
        if not 0 <= size.resize_after < size.depth or sum(axes) != size.head_dim or any(a < 2 or a % 2 for a in axes):
            raise ValueError(
                f"resize_after names one of {size.depth} blocks and axes sum to the {size.head_dim} channels of a head "
                f"in even parts; got {size.resize_after} and {tuple(axes)}."
            )
        self.blocks = nn.ModuleList(Block(size.heads, size.head_dim) for _ in range(size.depth))
        self.resize = resize
        self.resize_after, self.axes = size.resize_after, tuple(axes)
        self.gradient_checkpointing = False

    def forward(
        self, latents: Tensor, picture: Tensor, grids: tuple[Grid, Grid], spans: tuple[int | None, int | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, K, D) and picture tokens (B, h * w, D) on the first grid -> both behind the last block.

        Args:
            latents: Latent tokens.
            picture: Picture tokens, row by row.
            grids: (h, w) before and behind the change of resolution.
            spans: Range of the positions on both, see `axis_positions`.

        Returns:
            Latents, picture tokens on the second grid, and those on the first one just before the change.
        """
        count, before = latents.shape[1], picture
        x = torch.cat([latents, picture], dim=1)
        rotary = self._table(count, grids[0], spans[0], x)
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, rotary)
            if i == self.resize_after:
                before = x[:, count:]
                changed = to_sequence(self.resize(to_map(before, grids[0])))
                x = torch.cat([x[:, :count], changed], dim=1)
                rotary = self._table(count, grids[1], spans[1], x)
        return x[:, :count], x[:, count:], before

    def _table(self, latents: int, grid: Grid, span: int | None, x: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_table(latents, grid, span, self.axes)
        return cos.to(x.device), sin.to(x.device)

    def _run(self, block: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.gradient_checkpointing and self.training:
            out: Any = checkpoint(block, x, rotary, use_reentrant=False)
            return out
        found: Tensor = block(x, rotary)
        return found


def halved(span: int | None) -> int | None:
    """The range of positions at half the resolution."""
    return None if span is None else span // 2


class InstellaEncoder(nn.Module):
    """Pictures to features of K latent tokens.

    Args:
        size: Shape of the transformer.
        patch_size: Side of a patch in pixels.
        num_tokens: Latent tokens, K.
        out_dim: Channels per token handed to the quantizer.
        axes: See `rotary_table`.
    """

    def __init__(self, size: Size, patch_size: int, num_tokens: int, out_dim: int, axes: Sequence[int]) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, size.width, patch_size, stride=patch_size)
        self.latents = nn.Parameter(torch.randn(num_tokens, size.width) * 0.02)
        self.transformer = TwoScales(size, Halve(size.width), axes)
        self.norm = RMSNorm(size.width)
        self.head = nn.Linear(size.width, out_dim)

    def forward(self, images: Tensor, span: int | None) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W), sides multiples of two patches -> (B, K, out_dim), float32."""
        x = self.patch_embed((2.0 * images - 1.0).to(self.patch_embed.weight.dtype))  # (B, D, h, w)
        h, w = x.shape[-2:]
        latents = self.latents.to(x.dtype).expand(len(x), -1, -1)
        grids = ((h, w), (h // 2, w // 2))
        found, _, _ = self.transformer(latents, to_sequence(x), grids, (span, halved(span)))
        return float32_linear(self.norm(found), self.head)


class InstellaDecoder(nn.Module):
    """Codes of K latent tokens to pixels.

    Args:
        size: Shape of the transformer.
        patch_size: Side of a patch in pixels.
        in_dim: Channels of a code.
        axes: See `rotary_table`.
        repa_dim: Width of a teacher's features that the picture tokens are aligned with in training; None for none.
    """

    def __init__(
        self, size: Size, patch_size: int, in_dim: int, axes: Sequence[int], repa_dim: int | None = None
    ) -> None:
        super().__init__()
        width = size.width
        self.patch_size = patch_size
        self.norm_in = RMSNorm(in_dim)
        self.embed = nn.Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, width) * 0.02)
        self.transformer = TwoScales(size, Double(width), axes)
        self.norm = RMSNorm(width)
        self.to_patch = nn.Linear(width, patch_size * patch_size * 3)
        layers = (nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, repa_dim or 1))
        self.repa = nn.Sequential(*layers) if repa_dim else None

    def forward(self, codes: Tensor, grid: Grid, span: int | None) -> tuple[Tensor, Tensor]:
        """Codes (B, K, in_dim) on a grid of patches, both sides even -> pictures around [0, 1] and inner features.

        The features (B, h / 2, w / 2, D) are the picture tokens just before their resolution changes.
        """
        latents = self.embed(self.norm_in(codes.to(self.embed.weight.dtype)))
        coarse = (grid[0] // 2, grid[1] // 2)
        masks = self.mask_token.to(latents.dtype).expand(len(codes), coarse[0] * coarse[1], -1)
        _, x, inner = self.transformer(latents, masks, (coarse, grid), (halved(span), span))
        p = self.patch_size
        x = self.to_patch(self.norm(x)).unflatten(2, (p, p, 3)).unflatten(1, grid)  # (B, h, w, p, p, 3)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, 3, h * p, w * p)
        return 0.5 * x + 0.5, inner.unflatten(1, coarse)
