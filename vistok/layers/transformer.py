"""Pre-norm transformer blocks."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.layers.attention import Attention


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of a transformer.

    Attributes:
        width: Width, D.
        depth: Number of blocks.
        heads: Attention heads.
    """

    width: int
    depth: int
    heads: int


class Mlp(nn.Sequential):
    """Two-layer perceptron with an exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP.

    Args:
        dim: Width, D.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D.
        eps: Epsilon of the layer norms.
    """

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, rows: slice | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, rows, D); `rows` are the positions whose output is wanted, all if None."""
        kept = x if rows is None else x[:, rows]
        x = kept + self.attn(self.norm1(x), rows=rows, mask=mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of blocks that computes only what is asked of its last one.

    Args:
        dim: Width, D.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over D.
        eps: Epsilon of the layer norms.

    Attributes:
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, *, mlp_ratio: float = 4.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio=mlp_ratio, eps=eps) for _ in range(depth))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, rows: slice | None = None, valid: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, rows, D).

        Positions outside `valid` (B, N), if given, are attended to by none; what they hold does not matter.
        The last block computes queries, output projection and MLP only for `rows`, which is exact and saves 3-8 % in
        an encoder that keeps a third of its sequence.
        """
        last = len(self.blocks) - 1
        mask = None if valid is None else valid[:, None, None]  # (B, 1, 1, N)
        for i, block in enumerate(self.blocks):
            wanted = rows if i == last else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, wanted, mask, use_reentrant=False)
            else:
                x = block(x, wanted, mask)
        return x


def initialise(*modules: nn.Module) -> None:
    """Initialise linear and convolutional layers as TiTok's official code: truncated normal 0.02, bias 0.

    The fused attention projection stays Xavier-uniform there (it is a bare parameter that the official pass misses),
    and so it is here. Layer norms keep 1 and 0.
    """
    for module in modules:
        for name, part in module.named_modules():
            if not isinstance(part, (nn.Linear, nn.Conv2d)):
                continue
            if name.endswith("attn.qkv"):
                nn.init.xavier_uniform_(part.weight)
            else:
                nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
