"""Transformer layers whose positions enter queries and keys only (DETR's decoder layer, pre-norm)."""

from __future__ import annotations

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.layers.transformer import Mlp


class SplitAttention(nn.Module):
    """Multi-head attention with queries, keys and values from different inputs.

    Args:
        dim: Width, D.
        num_heads: Number of heads; must divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"A width of {dim} cannot be split into {num_heads} heads of equal size.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query (B, N, D), key and value (B, M, D) -> (B, N, D)."""
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        parts = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in parts)  # (B, A, N, D/A) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QueryLayer(nn.Module):
    """Self-attention among queries, cross-attention to a memory, MLP; pre-norm, residual.

    Positions are added to queries and keys, never to values or to the stream; the memory is not normalised.

    Args:
        dim: Width, D.
        num_heads: Attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = SplitAttention(dim, num_heads)
        self.cross_attn = SplitAttention(dim, num_heads)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, memory: Tensor, keys: Tensor, position: Tensor) -> Tensor:
        """One layer.

        Args:
            x: Queries, (B, N, D).
            memory: (B, M, D).
            keys: The memory plus its positions, (B, M, D).
            position: Positions of the queries, (N, D).

        Returns:
            (B, N, D).
        """
        t = self.norm1(x)
        x = x + self.self_attn(t + position, t + position, t)
        x = x + self.cross_attn(self.norm2(x) + position, keys, memory)
        return x + self.mlp(self.norm3(x))


class QueryTransformer(nn.Module):
    """A stack of `QueryLayer`.

    Args:
        dim: Width, D.
        depth: Number of layers.
        num_heads: Attention heads.

    Attributes:
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
    """

    def __init__(self, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(QueryLayer(dim, num_heads) for _ in range(depth))
        self.gradient_checkpointing = False

    def forward(
        self, x: Tensor, memory: Tensor | None, memory_position: Tensor, position: Tensor, tap: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the stack.

        Args:
            x: Queries, (B, N, D).
            memory: (B, M, D); None for the stream itself as it enters each layer.
            memory_position: (M, D).
            position: (N, D).
            tap: Layer, counted from 1, after which the stream is returned too.

        Returns:
            The stream at the end and at the tap, (B, N, D) each; None without a tap.
        """
        keys, tapped = None if memory is None else memory + memory_position, None
        for i, block in enumerate(self.blocks, 1):
            seen = (x, x + memory_position) if memory is None else (memory, keys)
            if self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, *seen, position, use_reentrant=False)
            else:
                x = block(x, *seen, position)
            tapped = x if i == tap else tapped
        return x, tapped
