"""The official xAR network, written plainly: something real for the flow's samplers to be compared on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vistok.flow import time_features

GRID, CELL = 16, 8


def cell_order():
    """Raster index of every token, cell by cell."""
    raster = torch.arange(GRID * GRID).view(GRID // CELL, CELL, GRID // CELL, CELL)
    return raster.permute(0, 2, 1, 3).reshape(-1)


def rms(x, weight=None):
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return x if weight is None else x * weight


def rotate(x, cos, sin):
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


class XarNet:
    """Velocity of all tokens given, each entity (cell of 64 tokens) with its own time, one class per picture."""

    def __init__(self, state, heads):
        self.state, self.heads = state, heads
        dim = state["z_proj.weight"].shape[0] // heads // 2
        freqs = 10000 ** (-torch.arange(0, dim, 2) / dim)
        angles = (torch.arange(GRID)[:, None] * freqs).repeat_interleave(2, -1)
        both = torch.cat([angles[:, None].expand(-1, GRID, -1), angles[None].expand(GRID, -1, -1)], -1).flatten(0, 1)
        self.cos, self.sin = both[cell_order()].cos(), both[cell_order()].sin()

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def condition(self, labels, times):
        """Labels (B,), times (B, entities) -> (B, entities, D)."""
        index = (times.float() * 1000).long()
        features = time_features(index / 1000, max_period=10000)
        t = self.linear(F.silu(self.linear(features, "time_embed.mlp.0")), "time_embed.mlp.2")
        return self.state["class_emb.weight"][labels].unsqueeze(1) + t

    def block(self, x, condition, mask, name):
        g1, g2, s1, s2, b1, b2 = self.linear(F.silu(condition), f"{name}.ada_lin.1").chunk(6, -1)
        n = x.shape[1]
        q, k, v = (
            self.linear(rms(x) * (1 + s1) + b1, f"{name}.attn.qkv")
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        q, k = (rotate(y, self.cos[:n], self.sin[:n]) for y in (q, k))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + g1 * self.linear(a, f"{name}.attn.proj")
        h = rms(x) * (1 + s2) + b2
        return x + g2 * self.linear(
            F.gelu(self.linear(h, f"{name}.mlp.fc1_g")) * self.linear(h, f"{name}.mlp.fc1_x"), f"{name}.mlp.fc2"
        )

    def __call__(self, x, labels, times):
        """x (B, N, 16) in cell order, labels (B,), times (B, entities) -> velocity (B, N, 16)."""
        state, n = self.state, x.shape[1]
        condition = self.condition(labels, times).repeat_interleave(CELL * CELL, 1)
        entity = torch.arange(n) // (CELL * CELL)
        mask = entity[:, None] >= entity[None]
        x = self.linear(x, "z_proj") + state["encoder_pos_embed_learned"][:, :n]
        x = rms(x, state["z_proj_ln.weight"])
        for part, depth in (("encoder", 2), ("decoder", 2)):
            if part == "decoder":
                x = self.linear(x, "decoder_embed") + state["decoder_pos_embed_learned"][:, :n]
            for i in range(depth):
                x = self.block(x, condition, mask, f"{part}_blocks.{i}")
            x = rms(x, state[f"{part}_norm.weight"])
        return self.linear(x, "pred")
