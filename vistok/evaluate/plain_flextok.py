"""FlexTok's decoder written down without any shortcut, on the weights of ours: what the benchmark compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.flow import Guidance, Sampler
from vistok.tokenizers.flextok import FlexTok
from vistok.tokenizers.flextok_net import VelocityDecoder, from_patches

MULTIPLE = 128
"""A packed row is padded to a multiple of this, as block-sparse attention kernels want it."""


def decode_batched(
    tok: FlexTok, codes: Tensor, lengths: Tensor, noise: Tensor, sampler: Sampler, guidance: Guidance
) -> Tensor:
    """Plain batched sampling: (B, P + K) tokens, all masks in full, modulations per picture, branch after branch."""
    full = torch.zeros(len(codes), dtype=torch.bool)

    def velocity(x: Tensor, t: float, branches: int = 1) -> list[Tensor]:
        time = torch.full((len(x),), t)
        null = [full, ~full][:branches]
        outputs = [tok.decoder(x, time, tok.decoder.registers(codes, lengths, empty))[0] for empty in null]
        return [tok.flow.velocity(out, x, time) for out in outputs]

    return sampler(velocity, noise, guidance)


def decode_packed(
    tok: FlexTok, codes: Tensor, lengths: Tensor, noise: Tensor, sampler: Sampler, guidance: Guidance
) -> Tensor:
    """The layout of the official code: lists of single pictures, packed into one row with a dense mask."""
    full = torch.zeros(len(codes), dtype=torch.bool)

    def velocity(x: Tensor, t: float, branches: int = 1) -> list[Tensor]:
        time = torch.full((len(x),), t)
        found = []
        for empty in [full, ~full][:branches]:
            registers = tok.decoder.registers(codes, lengths, empty)
            out = _packed_network(tok.decoder, list(x.split(1)), time, list(registers.split(1)))
            found.append(tok.flow.velocity(out, x, time))
        return found

    return sampler(velocity, noise, guidance)


def _packed_network(decoder: VelocityDecoder, x: Sequence[Tensor], time: Tensor, registers: Sequence[Tensor]) -> Tensor:
    parts, owner, kind = [], [], []
    for i, (one, own) in enumerate(zip(x, registers)):
        patches = decoder.patch_embed(one)
        parts.append(torch.cat([patches, own], 1))
        owner += [i] * parts[-1].shape[1]
        kind += [0] * patches.shape[1] + [1] * own.shape[1]
    row = torch.cat(parts, 1)  # (1, sum of lengths, D)
    pad = -row.shape[1] % MULTIPLE
    row = F.pad(row, (0, 0, 0, pad))
    index, kinds = torch.tensor(owner + [len(x)] * pad), torch.tensor(kind + [0] * pad)
    mask = (index[:, None] == index) & (index < len(x))
    mask |= torch.eye(len(index), dtype=torch.bool)  # a padding row that sees nothing would become NaN
    embedded = decoder.time(time)
    picture = index.clamp_max(len(x) - 1)
    for block in decoder.transformer.blocks:
        row = _packed_block(block, row, block.vectors(embedded)[:, picture, kinds], mask)
    head = decoder.head_modulation
    out = F.layer_norm(row, row.shape[-1:], eps=1e-5)
    if head is not None:
        vectors = head(embedded)[picture]  # (rows, 2, D)
        out = out * (1 + vectors[:, 1]) + vectors[:, 0]
    out = decoder.head(out)[0]
    grid = x[0].shape[-2] // decoder.patch, x[0].shape[-1] // decoder.patch
    found = [out[(index == i) & (kinds == 0)] for i in range(len(x))]
    return torch.cat([from_patches(one[None], decoder.patch, grid) for one in found])


def _packed_block(block: Any, x: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
    """One adaLN block on a packed row (1, rows, D); vectors (6, rows, D)."""
    gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = vectors
    h = F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale_attn) + shift_attn
    q, k, v = (y.unflatten(-1, (block.heads, -1)).transpose(1, 2) for y in block.qkv(h).chunk(3, -1))
    q, k = (F.layer_norm(y, y.shape[-1:], eps=1e-5) for y in (q, k))
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=block.scale)
    x = x + gate_attn * block.proj(a.transpose(1, 2).flatten(2))
    h = F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale_mlp) + shift_mlp
    return x + gate_mlp * block.mlp(h)
