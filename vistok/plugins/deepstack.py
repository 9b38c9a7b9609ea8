"""Deepstack features (Qwen3-VL): visual features that the host adds to the outputs of its first layers.

The host adds them by a mask of the full prompt. If a cut falls among those layers the runtime takes them out of the
call and adds the surviving rows itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vistok.compress.reduction import take

if TYPE_CHECKING:
    from vistok.plugins.runtime import Runtime


class Deepstack:
    """Forward hook of one decoder layer that adds its share of the deepstack features."""

    def __init__(self, runtime: Runtime, layer: int) -> None:
        self.runtime, self.layer = runtime, layer

    @staticmethod
    def take_over(runtime: Runtime, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Take the features out of the text model's arguments where a cut falls among their layers."""
        mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        first = min(runtime.cuts, default=runtime.depth)
        if mask is None or features is None or first >= len(features):
            return None
        assert runtime.call is not None
        runtime.call.memo["deepstack"] = (mask, list(features))
        return args, kwargs | {"visual_pos_masks": None, "deepstack_visual_embeds": None}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """Add the features of this layer to its output."""
        call = self.runtime.call
        if call is None or not call.prefill or "deepstack" not in call.memo:
            return None
        mask, features = call.memo["deepstack"]
        if self.layer >= len(features):
            return None
        full = output.new_zeros(*mask.shape, output.shape[-1])
        full[mask.to(full.device)] = features[self.layer].to(full.device, full.dtype)
        columns = call.columns_at(self.layer)
        added = take(full, columns.index) * columns.valid.unsqueeze(-1).to(full.dtype)
        return torch.add(output, added)
