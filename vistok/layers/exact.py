"""Modules whose numbers decide about ids, and therefore stay in float32."""

from __future__ import annotations

from typing import Any

from torch import nn


class KeepFloat32(nn.Module):
    """Moves to devices as usual but not to another precision: rounding what it holds would change ids."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `half` and the like go through."""
        exact = {name: t.detach() for name, t in [*self.named_parameters(), *self.named_buffers()]}
        super()._apply(fn, recurse)
        for name, t in [*self.named_parameters(), *self.named_buffers()]:
            if t.dtype != exact[name].dtype:
                t.data = exact[name].to(t.device)
        return self
