"""transformers: the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one sequence, rotary positions, windows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.reduction import take
from vistok.plugins.families.encoder import Encoder, Step
from vistok.registry import register


def window_order(tower: Any, grids: Tensor) -> Tensor | None:
    """Number of the group of patches, by raster, at every place of the tower's sequence; None if that is the raster.

    Args:
        tower: The tower.
        grids: Frames, rows and columns of patches of every picture, (pictures, 3).
    """
    if not hasattr(tower, "window_size"):
        return None
    if hasattr(tower, "get_window_index"):  # transformers up to 5.23
        return torch.as_tensor(tower.get_window_index(grids)[0])
    found: Tensor = sys.modules[type(tower).__module__].get_vision_window_index(
        grids,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
        kwargs={},
    )[0]
    return found


@register("family", "qwen_vit")
class QwenViT(Encoder):
    """Groups of patches that the merger joins stay together; a merged group takes its destination's positions.

    Every frame is reduced for itself. In blocks that look at windows only, a token stays in the window of its
    destination.
    """

    hosts = (
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen3VLVisionModel",
    )
    flat = True

    def blocks(self, tower: Any) -> Sequence[Any]:
        """The blocks."""
        return list(tower.blocks)

    def prefix(self, tower: Any) -> int:
        """None."""
        return 0

    def side(self, tower: Any) -> int:
        """Side of the patches that the merger joins."""
        return int(tower.spatial_merge_size)

    def scale(self, block: Any) -> float:
        """Factor of the logits."""
        return float(block.attn.scaling)

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """The attention branch on frames (B, T, D)."""
        attn = block.attn
        q, raw, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # (B, T, heads, d)
        turn = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision
        q, k = turn(q, raw, step.token_rows(step.given["cos"]), step.token_rows(step.given["sin"]))
        q, k, raw, v = (t.transpose(1, 2) for t in (q, k, raw, v))
        step.queries, step.keys, step.content = q, k, raw
        window = step.given["window"]
        if window is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=step.bias, scale=attn.scaling)
        else:
            mixed = in_windows(q, k, v, step.bias, step.token_rows(window), step.given["windows"], attn.scaling)
        found: Tensor = attn.proj(mixed.transpose(1, 2).flatten(2))
        return found

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """The MLP branch."""
        found: Tensor = block.mlp(block.norm2(x))
        return found


def in_windows(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Tensor, shape: tuple[int, int], scale: float
) -> Tensor:
    """Attention inside windows of different sizes, as one batch of padded windows.

    Args:
        q: Queries, (B, heads, T, d).
        k: Keys.
        v: Values.
        bias: Additive to the logits, (B, 1, 1, T).
        window: Window of every token, (B, T).
        shape: Number of windows and most tokens of one.
        scale: Factor of the logits.
    """
    batch, heads, tokens, d = q.shape
    windows, room = shape
    order = window.sort(dim=1, stable=True)
    start = torch.searchsorted(order.values, torch.arange(windows, device=q.device).expand(batch, -1).contiguous())
    rank = torch.arange(tokens, device=q.device) - start.gather(1, order.values)
    slot = torch.empty_like(window).scatter(1, order.indices, order.values * room + rank)  # (B, T)
    table = torch.full((batch, windows * room), tokens, device=q.device)
    table = table.scatter(1, slot, torch.arange(tokens, device=q.device).expand(batch, -1))

    def cut(x: Tensor) -> Tensor:  # (B, heads, T, d) -> (B * windows, heads, room, d)
        padded = F.pad(x.transpose(1, 2).flatten(2), (0, 0, 0, 1))
        return take(padded, table).view(batch * windows, room, heads, d).transpose(1, 2)

    logs = q.new_zeros(batch, tokens) if bias is None else bias[:, 0, 0]
    never = torch.finfo(q.dtype).min / 2  # finite: windows may be empty
    mask = F.pad(logs, (0, 1), value=never).gather(1, table).view(batch * windows, 1, 1, room)
    mixed = F.scaled_dot_product_attention(cut(q), cut(k), cut(v), attn_mask=mask, scale=scale)
    back = take(mixed.transpose(1, 2).reshape(batch, windows * room, heads * d), slot)
    found: Tensor = back.unflatten(2, (heads, d)).transpose(1, 2)
    return found
