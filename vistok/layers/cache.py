"""Keys and values of positions that were computed before, for causal stacks that go on token by token."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """What a causal stack has seen so far; hand the same object to every call.

    Memory grows by doubling, so going on token by token copies each key a constant number of times.

    Attributes:
        length: Positions that are in it, N.
    """

    def __init__(self) -> None:
        self.length = 0
        self._stores: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Enter the new positions of a layer, (B, A, n, D / A) each; returns all up to and with them.

        `length` moves on with `advance`, after the last layer.

        Raises:
            ValueError: Another batch than before.
        """
        end = self.length + keys.shape[2]
        if layer == len(self._stores):
            self._stores.append((_grown(keys, keys[:, :, :0], end), _grown(values, values[:, :, :0], end)))
        store = self._stores[layer]
        if store[0].shape[0] != keys.shape[0]:
            raise ValueError(f"The cache holds a batch of {store[0].shape[0]}, got one of {keys.shape[0]}.")
        if store[0].shape[2] < end:
            store = (
                _grown(keys, store[0][:, :, : self.length], end),
                _grown(values, store[1][:, :, : self.length], end),
            )
            self._stores[layer] = store
        store[0][:, :, self.length : end], store[1][:, :, self.length : end] = keys, values
        return store[0][:, :, :end], store[1][:, :, :end]

    def advance(self, count: int) -> None:
        """Say that `count` new positions went through every layer."""
        self.length += count


def _grown(like: Tensor, old: Tensor, least: int) -> Tensor:
    """A store of at least `least` positions, twice as many as before, that starts with the old ones."""
    b, a, _, d = like.shape
    found = torch.empty(b, a, max(least, 2 * old.shape[2], 16), d, dtype=like.dtype, device=like.device)
    found[:, :, : old.shape[2]] = old
    return found
