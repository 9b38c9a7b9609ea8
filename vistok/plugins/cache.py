"""Shrinking the key/value cache after prefill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.plugins.call import Call
from vistok.plugins.layout import Columns

if TYPE_CHECKING:
    from vistok.plugins.runtime import Runtime


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments: `cache` from transformers 5.24 on, `past_key_values` before."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def returned_cache(output: Any) -> Any:
    """The cache of a model output, under either name; None if there is none."""
    cache = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if cache is None else cache


def refuse(cache: Any, layers: Iterable[int]) -> None:
    """Refuse caches whose entries cannot be taken out.

    Raises:
        ValueError: A static, sliding, quantised or offloaded layer.
    """
    for i in layers:
        kind = type(cache.layers[i]).__name__ if i < len(cache.layers) else "DynamicLayer"
        if kind != "DynamicLayer" or type(cache).__name__ not in ("DynamicCache", "Cache"):
            raise ValueError(
                f"Layer {i} of the {type(cache).__name__} is a {kind}, from which no entries can be evicted. "
                "Use the dynamic cache, or a method that does not touch the cache."
            )


def window_rows(window: Tensor, call: Call, columns: Columns) -> tuple[Tensor, Tensor]:
    """Columns of the rows in a window mask (B, L): (B, R), and which of them exist, (B, R)."""
    key = ("window", id(columns))
    if key not in call.memo:
        count = int(window.sum(1).max())
        index = window.byte().sort(dim=1, stable=True).indices[:, -count:]
        call.memo[key] = (index, window.gather(1, index), columns)  # holding the columns keeps their id taken
    index, there, _ = call.memo[key]
    return index, there


def evict(runtime: Runtime, call: Call, cache: Any) -> None:
    """Let the method decide about every layer and gather what stays."""
    with torch.no_grad():
        for i in runtime.evicted:
            columns = call.columns_at(i)
            if not any(any(row) for row in columns.counts):
                continue
            view = call.view(columns, layer=i)
            final = call.columns_at(call.depth - 1)
            view.survivors = _survivors(columns, final, call.start.index.shape[1])
            view.survivor_counts = call.scoped(final.counts)
            decision = runtime.method.evict(view, call.received.pop(i, None), runtime.host)
            if decision.reduction is None:
                continue
            index, valid = decision.reduction.index, decision.reduction.valid
            layer = cache.layers[i]
            layer.keys, layer.values = (_gather(x, index) for x in (layer.keys, layer.values))
            per_sample = slice(None, None, len(index) // len(columns.index))
            shorter = columns.gather(index[per_sample], valid[per_sample], decision.counts)
            counts = call.counts_by_image(decision.counts, shorter)
            call.evicted[i] = columns.gather(index[per_sample], valid[per_sample], counts)


def _survivors(columns: Columns, final: Columns, prompt: int) -> Tensor:
    """True at columns that are still there at the last layer, (B, L)."""
    seen = torch.zeros(len(final.index), prompt, dtype=torch.bool, device=final.index.device)
    seen.scatter_(1, final.index, final.valid)  # a filler never shares its column with a token of its row
    return seen.gather(1, columns.index) & columns.valid


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Entries (B, kv_heads, L, d) at index (B, M), or (B * kv_heads, M) for own indices per head."""
    batch, heads = x.shape[:2]
    own = index.view(batch, -1, index.shape[1]).expand(batch, heads, -1)
    return x.gather(2, own.unsqueeze(-1).expand(*own.shape, x.shape[-1]))
