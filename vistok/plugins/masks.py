"""Attention masks and rotary tables for layers whose sequence or cache is shorter than the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def real_tokens(mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """Tokens that are no padding, (B, L), from whatever mask the host hands to its text model at prefill.

    Args:
        mask: None, 2-D, a ready 4-D mask, or a dictionary of masks by layer type.
        batch: B.
        length: L.
        device: Where the result is needed.

    Raises:
        TypeError: A mask of another kind.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        raise TypeError(f"Compression inside the language model cannot read a mask of type {type(mask).__name__}.")
    if mask.ndim == 4:  # the last query row sees every real token
        row = mask[:, 0, -1, :length]
        return (row if row.dtype == torch.bool else row >= 0).expand(batch, -1).to(device)
    return mask[:, :length].to(device=device, dtype=torch.bool)


def layer_mask(config: Any, layer: int, hidden: Tensor, cache: Any, valid: Tensor | None, memo: dict[Any, Any]) -> Any:
    """The mask a layer needs for its own cache length, for any attention backend.

    Args:
        config: Configuration of the text model.
        layer: Number of the layer.
        hidden: Hidden states entering it, (B, q, D).
        cache: The cache, or None.
        valid: Columns before the new ones that are tokens, (B, M), None if all are. New ones are all tokens.
        memo: Masks made in this forward; layers of one stage share them.
    """
    from transformers import masking_utils

    make: Any
    types = getattr(config, "layer_types", None)
    if types is not None:
        make = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[types[layer]]
    elif getattr(config, "sliding_window", None) is not None:
        make = masking_utils.create_sliding_window_causal_mask
    else:
        make = masking_utils.create_causal_mask
    query = hidden.shape[1]
    past = 0 if cache is None else cache.get_seq_length(layer)
    total = query if cache is None else cache.get_mask_sizes(query, layer)[0]
    key = (id(make), id(valid), query, total, past if isinstance(past, int) else layer)
    if key not in memo:
        extended = None
        if valid is not None:
            new = valid.new_ones(valid.shape[0], max(total - valid.shape[1], 0))
            extended = torch.cat([valid, new], dim=1).to(hidden.device)
        memo[key] = make(
            config,
            hidden,
            extended,
            cache,  # its name changed with transformers 5.24
            position_ids=None,
            layer_idx=layer,
        )
    return memo[key]
