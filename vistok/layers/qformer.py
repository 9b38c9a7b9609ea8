"""Q-Former: learned queries that read features through cross-attention, in BERT's post-norm form (arXiv 2301.12597)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class QueryAttention(nn.Module):
    """Multi-head attention of queries over a context, with BERT's output projection, residual and norm.

    Args:
        dim: Width of the queries, D.
        num_heads: Attention heads.
        context_dim: Width of the context, C.
        eps: Epsilon of the layer norm.
        dropout: Share of attention weights and of the result's channels that training drops.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int, *, eps: float, dropout: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"A width of {dim} cannot be split into {num_heads} heads of equal size.")
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, context: Tensor, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
        """Queries (B, N, D) over context (B, M, C) -> (B, N, D); `is_causal` lets query i see contexts 0..i only.

        `mask`, bool (B, M), is True at contexts that any query may see.
        """
        q, k, v = (
            layer(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, A, ., D/A)
            for layer, y in ((self.query, x), (self.key, context), (self.value, context))
        )
        seen = None if mask is None else mask[:, None, None]  # (B, 1, 1, M)
        dropped = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropped, is_causal=is_causal)
        return self.norm(x + F.dropout(self.proj(out.transpose(1, 2).flatten(2)), dropped))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention in some layers, MLP; a residual and a layer norm after each.

    Args:
        dim: Width, D.
        num_heads: Attention heads.
        context_dim: Width of the features, None for a layer without cross-attention.
        eps: Epsilon of the layer norms.
        dropout: See `QueryAttention`; of the MLP's result as well.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None, *, eps: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.attn = QueryAttention(dim, num_heads, dim, eps=eps, dropout=dropout)
        self.cross = (
            None if context_dim is None else QueryAttention(dim, num_heads, context_dim, eps=eps, dropout=dropout)
        )
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        *,
        is_causal: bool = False,
        mask: Tensor | None = None,
        feed_forward: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(B, N, D) and features (B, M, C) -> (B, N, D).

        Texts go through the same self-attention without features: `context` None, `mask` (B, N) for their padding, and
        a `feed_forward` of their own, residual and norm included, in place of the queries'.
        """
        x = self.attn(x, x, is_causal=is_causal, mask=mask)
        if self.cross is not None and context is not None:
            x = self.cross(x, context)
        if feed_forward is not None:
            return feed_forward(x)
        return self.norm(x + F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training))


class QFormer(nn.Module):
    """A stack of layers over learned queries; queries get no position embedding, only a layer norm.

    Args:
        dim: Width of the queries, D.
        depth: Layers.
        num_heads: Attention heads.
        context_dim: Width of the features, C.
        cross_every: Layers 0, n, 2 n ... have cross-attention.
        is_causal: Query i attends to queries 0..i only. SEED's official code switches this on by the literal test that
            there are 32 queries, with -10000 in the mask, which rounds to the same.
        eps: Epsilon of the layer norms.
        dropout: BERT's, 0.1 where it was published; of the normalised queries, all attention and all MLPs.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        context_dim: int,
        *,
        cross_every: int = 2,
        is_causal: bool = False,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.is_causal, self.dropout = is_causal, dropout
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.layers = nn.ModuleList(
            QFormerLayer(dim, num_heads, None if i % cross_every else context_dim, eps=eps, dropout=dropout)
            for i in range(depth)
        )

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Queries (N, D) and features (B, M, C) -> (B, N, D)."""
        x = F.dropout(self.norm(queries).expand(len(context), -1, -1), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, context, is_causal=self.is_causal)
        return x
