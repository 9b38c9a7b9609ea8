"""What one training step of a quantizer costs: time, and memory alive, without a profiler."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vistok.quantizers.base import Quantizer


def measure_step(quantizer: Quantizer, *, device: str = "cpu", repeats: int = 5) -> tuple[float, float]:
    """Cost of one training forward and backward of a quantizer on features (8, 256, in_dim).

    Statistics of the quantizer are left out of the measurement; its state may change.

    Args:
        quantizer: In training mode.
        device: Where it is.
        repeats: The best of so many is taken.

    Returns:
        Milliseconds, and the largest memory alive above the input, in MB.
    """
    usage, quantizer.usage = quantizer.usage, None
    side = getattr(quantizer, "scales", (16,))[-1]
    z = torch.randn(8, side * side, quantizer.in_dim, device=device).mul_(0.1).requires_grad_()

    def step() -> None:
        out = quantizer(z)
        (out.loss + out.codes.sum()).backward()

    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    with _AliveBytes([z, *quantizer.parameters(), *quantizer.buffers()]) as memory:
        step()
    quantizer.usage = usage
    return min(times) * 1e3, memory.largest / 2**20


class _AliveBytes(TorchDispatchMode):
    """Follows the storages that operations create: bytes alive now and the largest they ever were."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive = self.largest = 0
        self._known = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf.untyped_storage())
        return out

    def _enter(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        self.alive += storage.nbytes()
        self.largest = max(self.largest, self.alive)
        weakref.finalize(storage, self._leave, storage.nbytes())

    def _leave(self, nbytes: int) -> None:
        self.alive -= nbytes
