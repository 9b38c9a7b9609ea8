"""Self-attention on fused scaled-dot-product kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    Args:
        dim: Width, D.
        num_heads: Number of heads; must divide `dim`.
        bias: Whether the projections have a bias.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"A width of {dim} cannot be split into {num_heads} heads of equal size.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, *, rows: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend over all positions.

        Args:
            x: (B, N, D).
            rows: Positions whose output is wanted; the others are only attended to. All if None.
            mask: Additive or boolean attention mask, broadcastable to (B, A, rows, N).

        Returns:
            (B, rows, D).
        """
        if rows is None:
            q, k, v = self._heads(self.qkv(x), 3)
        else:
            dim = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            (q,) = self._heads(F.linear(x[:, rows], weight[:dim], None if bias is None else bias[:dim]), 1)
            k, v = self._heads(F.linear(x, weight[dim:], None if bias is None else bias[dim:]), 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, rows, D)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # parts x (B, A, N, D/A)


def float32_linear(x: Tensor, linear: nn.Linear | nn.Conv2d) -> Tensor:
    """Apply a linear layer (or a 1x1 convolution's weights) to (B, N, D) in float32 with autocast off.

    A projection in bf16 in front of a quantizer flips ids (about 1 % of FSQ ids on random data), so every projection
    to a quantizer goes through here.
    """
    with torch.autocast(x.device.type, enabled=False):
        bias = None if linear.bias is None else linear.bias.float()
        return F.linear(x.float(), linear.weight.float().flatten(1), bias)
