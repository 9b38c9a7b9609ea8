"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vistok.train.sharding import cut_like


class EMA:
    """Averaged parameters of a module.

    After update t (from 0) the average moves by 1 - d with d = min(decay, (1 + t) / (10 + t)), and the first update
    copies, as in the official TiTok trainer. Frozen parameters are copied; buffers are not averaged, they are the
    module's own.

    Args:
        module: The module, unwrapped; its parameters may be sharded, the averages then are, too.
        decay: The decay it ends with.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = module
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        self.updates += 1
        current = dict(self.module.named_parameters())
        moving = [n for n in self.average if current[n].requires_grad]
        for name in self.average.keys() - set(moving):
            self.average[name].copy_(current[name])
        if moving:
            torch._foreach_lerp_([self.average[n] for n in moving], [current[n].detach() for n in moving], 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged parameters inside this context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take back the averages and the number of updates so far."""
        for name, value in self.average.items():
            value.copy_(cut_like(state[name], value))
        self.updates = updates
