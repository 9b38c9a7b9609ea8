"""Work inside a vision tower: merging after its first block, the class token's attention in its last."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vistok.compress.method import TowerMethod
from vistok.compress.reduction import Reduction
from vistok.plugins.handle import Handle


class TowerWork:
    """Hooks of one run of a CLIP-like tower (class token first, separate q_proj and k_proj).

    Attributes:
        reduction: How patches were merged, None if they were not.
        class_row: Attention of the class token in the last block, mean over heads, (B, N).
    """

    def __init__(self, method: TowerMethod) -> None:
        self.method = method
        self.reduction: Reduction | None = None
        self.class_row: Tensor | None = None

    def after_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Merge the patches."""
        x: Tensor = output[0] if isinstance(output, tuple) else output
        side = math.isqrt(x.shape[1] - 1)
        with torch.no_grad():
            self.reduction = self.method.merge_patches(x[:, 1:], (side, side))
        if self.reduction is None:
            return None
        merged = torch.cat([x[:, :1], self.reduction.apply(x[:, 1:])], dim=1)
        return (merged, *output[1:]) if isinstance(output, tuple) else merged

    def after_last(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Read the class token's attention."""
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad():
            q, k = module.q_proj(x[:, :1]), module.k_proj(x)
            q, k = (t.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for t in (q, k))
            logits = (q @ k.transpose(2, 3)).float() * module.head_dim**-0.5
            self.class_row = logits.softmax(-1).mean(1)[:, 0, 1:]


@contextlib.contextmanager
def working(tower: Any, method: TowerMethod) -> Iterator[TowerWork]:
    """Do the tower's part of a method inside the block.

    Raises:
        TypeError: The tower is not CLIP-like.
    """
    layers: Any = getattr(getattr(tower, "encoder", None), "layers", None)
    fits = layers is not None and hasattr(layers[0], "self_attn") and hasattr(layers[0].self_attn, "q_proj")
    if not fits or not hasattr(tower.embeddings, "class_embedding"):
        raise TypeError(
            f"Merging in the tower needs a class token and separate projections; a {type(tower).__name__} has not "
            "both. Use merge=False: the filter and the cache work on every host."
        )
    handle, work = Handle(), TowerWork(method)
    handle.after(layers[0], work.after_first)
    handle.after(layers[-1].self_attn, work.after_last)
    try:
        yield work
    finally:
        handle.remove()
