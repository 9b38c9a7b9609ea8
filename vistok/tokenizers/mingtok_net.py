"""MingTok's networks: low-level encoder, causal semantic decoder, pixel decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vistok.layers.attention import Attention
from vistok.layers.cache import KeyValueCache
from vistok.layers.mlp import SwiGLU, gated_width
from vistok.layers.transformer import Mlp
from vistok.quantizers.base import Positions, Quantized, Quantizer


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Shape of a transformer; heads have 64 channels unless said otherwise.

    Attributes:
        width: D.
        depth: Blocks.
        heads: Attention heads; width / 64 if None.
    """

    width: int
    depth: int
    heads: int | None = None


class CausalAttention(Attention):
    """Token i sees tokens 0..i; with a cache the positions in it come first."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        q, k, v = self._heads(self.qkv(x), 3)
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(layer, k, v)
        mask = None
        if past and x.shape[1] > 1:
            order = torch.arange(past + x.shape[1], device=x.device)
            mask = order <= order[past:, None]  # (n, past + n)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not past and x.shape[1] > 1)
        return self.proj(out.transpose(1, 2).flatten(2))


class MingBlock(nn.Module):
    """Pre-norm block with biases, eps 1e-6.

    Args:
        dim: Width, D.
        heads: Attention heads.
        gated: SwiGLU of two thirds of four times the width (a multiple of 8), else a GELU MLP of four times.
        causal: See `CausalAttention`.
    """

    def __init__(self, dim: int, heads: int, *, gated: bool, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CausalAttention(dim, heads) if causal else Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp: nn.Module = SwiGLU(dim, gated_width(dim, multiple=8)) if gated else Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """(B, N, D) -> (B, N, D); options go to the attention."""
        x = x + self.attn(self.norm1(x), **options)
        return x + self.mlp(self.norm2(x))


class MingStack(nn.ModuleList):
    """Blocks of one kind. See `MingBlock`.

    Attributes:
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
    """

    def __init__(self, shape: Stack, *, gated: bool, causal: bool = False) -> None:
        heads = shape.width // 64 if shape.heads is None else shape.heads
        super().__init__(MingBlock(shape.width, heads, gated=gated, causal=causal) for _ in range(shape.depth))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(B, n, D) -> (B, n, D), without the last norm; a cache is moved on."""
        for i, block in enumerate(self):
            if cache is not None:
                x = block(x, cache=cache, layer=i)
            elif self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        if cache is not None:
            cache.advance(x.shape[1])
        return x


def narrow(x: Tensor, dim: int) -> Tensor:
    """Parameter-free shortcut to fewer channels: means of contiguous groups, (..., D) -> (..., dim)."""
    return x.unflatten(-1, (dim, -1)).mean(-1)


def widen(x: Tensor, dim: int) -> Tensor:
    """Parameter-free shortcut to more channels: each repeated contiguously, (..., C) -> (..., dim)."""
    return x.repeat_interleave(dim // x.shape[-1], dim=-1)


class LowLevelEncoder(nn.Module):
    """ViT on [patches, class token] with a shortcut past the output layer.

    Args:
        grid: Patches (h, w).
        patch: Side of a patch in pixels.
        shape: Shape of the transformer.
        out_dim: Channels of a latent; divides the width.
        masked: Whether patches may be masked in training (a learnt vector stands for them).
    """

    def __init__(self, grid: tuple[int, int], patch: int, shape: Stack, out_dim: int, *, masked: bool) -> None:
        super().__init__()
        self.grid, self.out_dim = grid, out_dim
        self.patch_embed = nn.Conv2d(3, shape.width, patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, shape.width))
        self.position = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1] + 1, shape.width))
        self.mask_token = nn.Parameter(torch.zeros(shape.width)) if masked else None
        self.blocks = MingStack(shape, gated=True)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, out_dim)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pictures in [-1, 1] -> latents of patches and class token, (B, h * w + 1, out_dim).

        Args:
            images: (B, 3, H, W).
            mask: True where a patch is hidden, (B, h * w).
        """
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)  # (B, h * w, D)
        if mask is not None:
            assert self.mask_token is not None
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([x, self.class_token.to(x.dtype).expand(len(x), -1, -1)], 1) + self.position
        x = self.blocks(x)
        return self.head(F.gelu(self.norm(x))) + narrow(x, self.out_dim)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position table (h * w + 1, D), the class token's row last, for another grid, as DINO's code resizes it.

    Bicubic without antialias, by the factor (new + 0.1) / old, which shifts the samples a little against those of a
    resize to a size.
    """
    if old == new:
        return table
    grid = table[:-1].float().T.reshape(1, -1, *old)  # (1, D, h, w)
    factors = [(b + 0.1) / a for a, b in zip(old, new)]
    resized = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    assert resized.shape[-2:] == new
    return torch.cat([resized.flatten(2)[0].T.to(table.dtype), table[-1:]])


class SemanticDecoder(nn.Module):
    """Causal transformer on latents without positions: order comes from causality, place from the latents.

    Args:
        in_dim: Channels of a latent; divides the width.
        shape: Shape of the transformer.
    """

    def __init__(self, in_dim: int, shape: Stack) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, shape.width)
        self.blocks = MingStack(shape, gated=True, causal=True)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)

    def forward(self, z: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Latents (B, n, in_dim) -> features (B, n, D); with a cache they go on behind what is in it."""
        z = z.to(self.embed.weight.dtype)
        return self.norm(self.blocks(self.embed(z) + widen(z, self.embed.out_features), cache))


class PixelDecoder(nn.Module):
    """Semantic features to pixels: every token becomes ratio^2 smaller ones, which attend to each other.

    Computed in float32 with autocast off (bf16 leaves banding).

    Args:
        in_dim: Width of the semantic features.
        ratio: Side of a semantic patch over that of a pixel patch.
        patch: Side of a pixel patch.
        shape: Shape of the transformer.
    """

    def __init__(self, in_dim: int, ratio: int, patch: int, shape: Stack) -> None:
        super().__init__()
        self.ratio, self.patch = ratio, patch
        self.connector = nn.Linear(in_dim, shape.width * ratio * ratio)
        self.blocks = MingStack(shape, gated=False)
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, patch * patch * 3)

    def patches(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, h * w, in_dim) -> pixels of patches in raster order, (B, ratio^2 h w, patch * patch * 3)."""
        r = self.ratio
        x = self.connector(features).unflatten(2, (r, r, -1)).unflatten(1, grid)  # (B, h, w, r, r, D)
        x = x.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)  # (B, h * r * w * r, D)
        return self.head(self.norm(self.blocks(x)))

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features (B, h * w, in_dim) -> pictures around [-1, 1], (B, 3, H, W)."""
        with torch.autocast(features.device.type, enabled=False):
            x = self.patches(features.to(self.connector.weight.dtype), grid).float()
        rows, p = (grid[0] * self.ratio, grid[1] * self.ratio), self.patch
        x = x.unflatten(2, (p, p, 3)).unflatten(1, rows)  # (B, h, w, p, p, 3)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class LatentRange(Quantizer):
    """Continuous latents, moved to about zero mean and unit scale: (z - mean) / scale. No ids, no loss, no chance.

    Args:
        dim: Channels of a latent.
        mean: Mean over all channels.
        scale: Standard deviation over all channels.
    """

    def __init__(self, dim: int, mean: float, scale: float) -> None:
        super().__init__(dim, ())
        if not scale > 0:
            raise ValueError(f"The scale of latents is positive, got {scale}.")
        self.mean, self.scale = mean, scale

    def mode(self, z: Tensor) -> Tensor:
        """Features (B, N, D) -> codes."""
        return (z.float() - self.mean) / self.scale

    def draw(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Not possible.

        Raises:
            ValueError: Always.
        """
        raise ValueError("These latents are not drawn: the encoder gives one answer. Leave out sample=True.")

    def restore(self, codes: Tensor) -> Tensor:
        """Codes -> latents as the decoder takes them."""
        return codes * self.scale + self.mean

    def quantize(
        self, z: Tensor, positions: Positions, grid: tuple[int, int] | None, generator: torch.Generator | None
    ) -> Quantized:
        """See `Quantizer.forward`."""
        return self.result(self.mode(z), None, {})

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Not possible.

        Raises:
            ValueError: Always.
        """
        raise ValueError("These latents are continuous and have no ids.")

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Not possible.

        Raises:
            ValueError: Always.
        """
        raise ValueError("These latents are continuous and have no ids.")
