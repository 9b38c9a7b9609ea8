"""Attention rows of a layer, read from outside while the layer runs its own fast attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from vistok.compress.reduction import take
from vistok.compress.score import row_probabilities

Rotary = Callable[..., tuple[Tensor, Tensor]]
CHUNK = 128  # query rows at a time where all rows are wanted: the L x L map never exists


def rotary_function(attn: Any) -> Rotary | None:
    """`apply_rotary_pos_emb` of the module that defines an attention class, None if it has none."""
    module = sys.modules[type(attn).__module__]
    return cast("Rotary | None", getattr(module, "apply_rotary_pos_emb", None))


def can_score(attn: Any) -> bool:
    """Whether rows of this attention can be read: separate projections and rotary positions."""
    parts = ("q_proj", "k_proj", "head_dim", "scaling")
    return all(hasattr(attn, part) for part in parts) and rotary_function(attn) is not None


def project(attn: Any, x: Tensor, name: str) -> Tensor:
    """Queries (`q`) or keys (`k`) before rotation, x (B, T, D) -> (B, heads, T, d)."""
    heads = getattr(attn, f"{name}_proj")(x).unflatten(-1, (-1, attn.head_dim))
    norm = getattr(attn, f"{name}_norm", None)
    found: Tensor = (heads if norm is None else norm(heads)).transpose(1, 2)
    return found


def rotated(attn: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, heads, T, d) by tables (B, T, d)."""
    rotate = rotary_function(attn)
    assert rotate is not None
    return rotate(heads, heads[:, :1], cos, sin)[0]


def keys_of(attn: Any, x: Tensor, tables: tuple[Tensor, Tensor], cache: Any) -> Tensor:
    """Keys of a prefill: from the cache if the layer just wrote them there, else computed, (B, kv_heads, L, d)."""
    if cache is not None and type(cache.layers[attn.layer_idx]).__name__ in ("DynamicLayer", "StaticLayer"):
        keys: Tensor = cache.layers[attn.layer_idx].keys
        return keys[:, :, : x.shape[1]]
    return rotated(attn, project(attn, x, "k"), *tables)


def visible_keys(attn: Any, row_index: Tensor, valid: Tensor) -> Tensor:
    """Keys each row may look at, (B, R, L): tokens up to the row, inside a sliding window if the layer has one."""
    distance = row_index.unsqueeze(-1) - torch.arange(valid.shape[1], device=valid.device)
    seen = (distance >= 0) & valid.unsqueeze(1)
    window = getattr(attn, "sliding_window", None)
    return seen if window is None else seen & (distance < window)


def attention_rows(
    attn: Any, x: Tensor, row_index: Tensor, valid: Tensor, tables: tuple[Tensor, Tensor], cache: Any
) -> Tensor:
    """Attention probabilities of a few rows of a layer.

    Args:
        attn: The attention module.
        x: Its input, after the layer's norm, (B, L, D).
        row_index: Columns of the rows, (B, R).
        valid: Columns that are tokens, (B, L).
        tables: cos and sin, (1 or B, L, d).
        cache: The cache if the layer has already written its keys, else None.

    Returns:
        float32, (B, heads, R, L).
    """
    keys = keys_of(attn, x, tables, cache)
    queries = _queries(attn, x, row_index, tables)
    return row_probabilities(queries, keys, scale=attn.scaling, visible=visible_keys(attn, row_index, valid))


def received(
    attn: Any,
    x: Tensor,
    row_index: Tensor,
    row_valid: Tensor,
    valid: Tensor,
    tables: tuple[Tensor, Tensor],
    cache: Any,
) -> Tensor:
    """Attention mass that every key receives from the given rows, in chunks of rows; see `attention_rows`.

    Returns:
        float32, (B, kv_heads, L), summed over the rows and the query heads of a key head.
    """
    keys = keys_of(attn, x, tables, cache)
    total = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
    for start in range(0, row_index.shape[1], CHUNK):
        part, there = row_index[:, start : start + CHUNK], row_valid[:, start : start + CHUNK]
        queries = _queries(attn, x, part, tables)
        seen = visible_keys(attn, part, valid) & there.unsqueeze(-1)
        probabilities = row_probabilities(queries, keys, scale=attn.scaling, visible=seen)
        total += probabilities.sum(2).unflatten(1, (keys.shape[1], -1)).sum(2)
    return total


def _queries(attn: Any, x: Tensor, row_index: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (take(table, row_index) for table in tables)
    return rotated(attn, project(attn, take(x, row_index), "q"), cos, sin)
