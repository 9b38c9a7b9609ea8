"""Trained compressors: networks that turn a grid of tower features into a few tokens (QueCC, TokenPacker).

Every output token owns a window of the grid: its query comes from the window, and attends to that window's keys and
values, which are made of several levels of the tower.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = (12, 16, 22, 23)
"""Hidden states of a tower of 24 blocks that keys and values are made of, 0 being the embeddings (both papers)."""


def out_grid(grid: tuple[int, ...], window: int) -> tuple[int, int]:
    """(h, w) of the outputs for a grid of tokens.

    Raises:
        ValueError: The tokens lie on no two-dimensional grid, or windows do not cover it.
    """
    if len(grid) != 2 or grid[0] % window or grid[1] % window:
        raise ValueError(f"A grid of {grid} cannot be cut into windows of {window} x {window}.")
    return grid[0] // window, grid[1] // window


def to_windows(x: Tensor, grid: tuple[int, ...], window: int) -> Tensor:
    """Tokens (B, h * w, C), row by row -> the tokens of every window, (B, M, window^2, C), windows row by row."""
    h, w = out_grid(grid, window)
    x = x.unflatten(1, (h, window, w, window))  # (B, h, k, w, k, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Multi-head attention of one query per window over the window's tokens.

    Args:
        dim: Width, C.
        num_heads: Attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"A width of {dim} cannot be split into {num_heads} heads of equal size.")
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj.weight)  # PyTorch's multi-head attention
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (B, M, C), keys and values (B, M, n, C) -> (B, M, C)."""
        parts = zip((query.unsqueeze(2), key, value), self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3))
        q, k, v = (
            F.linear(x, weight, bias).flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in parts
        )  # (B M, heads, 1 or n, C / heads)
        out = F.scaled_dot_product_attention(q, k, v)  # (B M, heads, 1, C / heads)
        found: Tensor = self.out_proj(out.flatten(1).unflatten(0, query.shape[:2]))
        return found


def _two_layers(in_dim: int, dim: int) -> list[nn.Module]:
    return [nn.Linear(in_dim, dim), nn.GELU(), nn.Linear(dim, dim)]


class Compressor(nn.Module):
    """What all trained compressors are.

    Attributes:
        window: Side of a window in tokens.
        text_dim: Channels of the question vector it reads, None if it reads none.
    """

    window: int
    text_dim: int | None = None
    attn: WindowAttention

    def forward(self, features: Tensor, levels: Tensor, grid: tuple[int, ...], text: Tensor | None = None) -> Tensor:
        """Compress a batch of grids.

        Args:
            features: What the host's projector would get, (B, h * w, C).
            levels: Hidden states of several blocks side by side, (B, h * w, K).
            grid: (h, w), multiples of `window`.
            text: Vector of the question, (B, t), for compressors that read one.

        Returns:
            (B, M, C), in front of the projector.
        """
        raise NotImplementedError


class QueCCCompressor(Compressor):
    """Query-based convolutional cross-attention (QueCC, arXiv 2411.03312, section 4).

    The question's vector is added to every feature; a depth-wise convolution makes one query per window. No residual
    and no norm follow the attention. A zero vector is not the same as no text, because the projection has a bias.

    Args:
        dim: Width of the features, C.
        levels_dim: Width of the levels, K (four levels of CLIP-L: 4096).
        text_dim: Width of the question's vector, t; None for a compressor without text, which serves every question.
        window: Kernel and stride, k.
        num_heads: Attention heads.
    """

    def __init__(self, *, dim: int, levels_dim: int, text_dim: int | None, window: int, num_heads: int = 8) -> None:
        super().__init__()
        self.window, self.text_dim = window, text_dim
        self.text = None
        if text_dim is not None:
            self.text = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim, eps=1e-6))
        self.query = nn.Sequential(*_two_layers(dim, dim), nn.LayerNorm(dim, eps=1e-6))
        self.key = nn.Sequential(*_two_layers(levels_dim, dim), nn.LayerNorm(dim, eps=1e-6))
        self.value = nn.Sequential(*_two_layers(levels_dim, dim), nn.LayerNorm(dim, eps=1e-6))
        self.downsample = nn.Conv2d(dim, dim, window, stride=window, groups=dim)
        self.attn = WindowAttention(dim, num_heads)

    def forward(self, features: Tensor, levels: Tensor, grid: tuple[int, ...], text: Tensor | None = None) -> Tensor:
        """See `Compressor.forward`.

        Raises:
            ValueError: A question's vector is missing, or given where none is read; a grid windows do not cover.
        """
        out_grid(grid, self.window)
        if (text is None) != (self.text is None):
            raise ValueError("This compressor reads a question's vector." if text is None else "It reads no text.")
        if self.text is not None:
            assert text is not None
            features = features + self.text(text).unsqueeze(1)
        maps = self.query(features).transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
        query = self.downsample(maps).flatten(2).transpose(1, 2)  # (B, M, C)
        key, value = (to_windows(layer(levels), grid, self.window) for layer in (self.key, self.value))
        out: Tensor = self.attn(query, key, value)
        return out


class TokenPackerCompressor(Compressor):
    """TokenPacker (arXiv 2407.02392, section 3): queries are the bilinearly smaller features; no text.

    Args:
        dim: Width of the features, C.
        levels_dim: Width of the levels, K.
        window: Scale factor, s.
        num_heads: Attention heads.
    """

    def __init__(self, *, dim: int, levels_dim: int, window: int, num_heads: int = 8) -> None:
        super().__init__()
        self.window = window
        self.query = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim, eps=1e-6))
        self.key = nn.Sequential(*_two_layers(levels_dim, dim), nn.LayerNorm(dim, eps=1e-6))
        self.value = nn.Sequential(*_two_layers(levels_dim, dim), nn.LayerNorm(dim, eps=1e-6))
        self.attn = WindowAttention(dim, num_heads)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, levels: Tensor, grid: tuple[int, ...], text: Tensor | None = None) -> Tensor:
        """See `Compressor.forward`."""
        if text is not None:
            raise ValueError("It reads no text.")
        maps = features.float().transpose(1, 2).unflatten(2, grid)
        small = F.interpolate(maps, out_grid(grid, self.window), mode="bilinear").to(features.dtype)
        query = self.query(small.flatten(2).transpose(1, 2))  # (B, M, C)
        key, value = (to_windows(layer(levels), grid, self.window) for layer in (self.key, self.value))
        out: Tensor = self.attn(query, key, value)
        return out


def projector(dim: int, out_dim: int) -> nn.Sequential:
    """LLaVA's projector behind a compressor, (B, M, C) -> (B, M, D)."""
    return nn.Sequential(*_two_layers(dim, out_dim))
