"""Blocks on rows: sequences of patches and registers of different lengths, computed as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vistok.layers.mlp import SwiGLU, gated_width
from vistok.layers.modulation import Modulation, modulate


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of a transformer. The published ones have width 64 x depth and heads of 64 channels.

    Attributes:
        width: D.
        depth: Blocks.
        heads: Attention heads.
    """

    width: int
    depth: int
    heads: int


PATCHES, REGISTERS = 0, 1
"""The two kinds of tokens, which have vectors of their own in the adaptive layer norms."""


@dataclass(frozen=True)
class Group:
    """Sequences of one length.

    Attributes:
        count: Sequences, S.
        registers: Registers of each, R.
        mask: Boolean or additive attention mask, broadcastable to (S, A, P + R, P + R).
    """

    count: int
    registers: int
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How sequences of [patches, registers] lie in one matrix of rows: all patches, group by group, then all registers.

    What acts on single tokens sees one matrix, whatever the lengths; only attention sees sequences.

    Attributes:
        patches: Patches of every sequence, P.
        groups: Sequences of equal length.
    """

    patches: int
    groups: tuple[Group, ...]

    @property
    def border(self) -> int:
        """Rows that are patches."""
        return self.patches * sum(group.count for group in self.groups)

    def per_kind(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (rows, D) as patches (S, P, D) of all sequences and registers (S, R, D), or (1, rows, D) if R varies."""
        registers = x[self.border :]
        count = self.groups[0].count if len(self.groups) == 1 else 1
        return x[: self.border].unflatten(0, (-1, self.patches)), registers.unflatten(0, (count, -1))

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Rows with the shift and scale of their kind and sequence, (S or 1, 2, D)."""
        kinds = enumerate(self.per_kind(x))
        return torch.cat([modulate(y, shift[:, i, None], scale[:, i, None]).flatten(0, 1) for i, y in kinds])

    def gated(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        """X + gate update, the gate by kind and sequence, (S or 1, 2, D)."""
        kinds = zip(self.per_kind(x), self.per_kind(update))
        return torch.cat([(y + gate[:, i, None] * u).flatten(0, 1) for i, (y, u) in enumerate(kinds)])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention inside every sequence; rows (rows, A, D / A) of queries, keys and values -> (rows, D)."""
        found: list[Tensor] = []
        tails: list[Tensor] = []
        patch, register = 0, self.border
        for group in self.groups:
            ends = patch + group.count * self.patches, register + group.count * group.registers
            parts = [self._sequences(x, patch, register, ends, group.count) for x in (q, k, v)]
            mask = group.mask
            if mask is not None and mask.is_floating_point():
                mask = mask.to(v.dtype)
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)
            out = out.transpose(1, 2).flatten(2)  # (S, P + R, D)
            found.append(out[:, : self.patches].flatten(0, 1))
            tails.append(out[:, self.patches :].flatten(0, 1))
            patch, register = ends
        return torch.cat([*found, *tails])

    def _sequences(self, x: Tensor, patch: int, register: int, ends: tuple[int, int], count: int) -> Tensor:
        head, tail = x[patch : ends[0]], x[register : ends[1]]
        both = [part.unflatten(0, (count, -1)) for part in (head, tail) if len(part)]
        return torch.cat(both, 1).transpose(1, 2)  # (S, A, P + R, D / A)


def plain_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without weights, eps 1e-5, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


class FlexBlock(nn.Module):
    """Pre-norm block without biases: attention with normalised queries and keys, then SwiGLU.

    Logits are scaled by 8 / head width (muP; the usual 1/8 at width 64).

    Args:
        dim: Width, D.
        heads: Attention heads.
        modulated: Whether time gates, shifts and scales both halves; six vectors for patches, then six for registers,
            in the order gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp (not DiT's).
    """

    def __init__(self, dim: int, heads: int, *, modulated: bool) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"A width of {dim} cannot be split into {heads} heads of equal size.")
        self.heads, self.scale = heads, 8 / (dim // heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.mlp = SwiGLU(dim, gated_width(dim), bias=False)
        self.modulation = Modulation(dim, 12) if modulated else None

    def vectors(self, time: Tensor) -> Tensor:
        """Time embeddings (S, D) -> (6, S, 2, D), the second-last axis patches and registers."""
        assert self.modulation is not None
        return self.modulation(time).unflatten(1, (2, 6)).permute(2, 0, 1, 3)

    def forward(self, x: Tensor, layout: Layout, vectors: Tensor | None = None) -> Tensor:
        """Rows (rows, D) -> (rows, D); `vectors` from `vectors` in a modulated block."""
        if vectors is None:
            x = x + self.attend(plain_norm(x), layout)
            return x + self.mlp(plain_norm(x))
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = vectors
        x = layout.gated(x, self.attend(layout.modulate(plain_norm(x), shift_attn, scale_attn), layout), gate_attn)
        return layout.gated(x, self.mlp(layout.modulate(plain_norm(x), shift_mlp, scale_mlp)), gate_mlp)

    def attend(self, x: Tensor, layout: Layout) -> Tensor:
        """Attention over normalised rows."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # 3 x (rows, A, D / A)
        return self.proj(layout.attend(plain_norm(q), plain_norm(k), v, self.scale))


class FlexTransformer(nn.Module):
    """A stack of `FlexBlock`s.

    Args:
        dim: Width, D.
        depth: Blocks.
        heads: Attention heads.
        modulated: See `FlexBlock`.

    Attributes:
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
    """

    def __init__(self, dim: int, depth: int, heads: int, *, modulated: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FlexBlock(dim, heads, modulated=modulated) for _ in range(depth))
        self.gradient_checkpointing = False

    def forward(
        self, x: Tensor, layout: Layout, vectors: Sequence[Tensor] | None = None, read: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows (rows, D) -> rows, and the rows after block `read` (None if not asked for)."""
        seen = None
        for i, block in enumerate(self.blocks):
            given = None if vectors is None else vectors[i]
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, layout, given, use_reentrant=False)
            else:
                x = block(x, layout, given)
            seen = x if i == read else seen
        return x, seen
