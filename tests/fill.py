"""Deterministic weights and images: a tensor's values depend on its name and shape alone, an image on its seed."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import nn


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden weights of one tensor."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape)
    if name.endswith("running_var"):
        x = 1.0 + 0.1 * np.abs(x)
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(("weight", "scale", "gamma")):
        x = 1.0 + 0.1 * x
    else:
        x = 0.1 * x
    return x.astype(np.float32)


def fill_module(module: nn.Module) -> nn.Module:
    """Overwrite every floating-point entry of the state dict in place."""
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            filled = fill(key, tuple(value.shape)) if value.ndim else fill(key, (1,))[0]
            value.copy_(torch.as_tensor(filled))
    return module


def image(batch: int, size: int, seed: int = 0) -> torch.Tensor:
    """Images in [0, 1], (batch, 3, size, size): blocky noise, so that there is structure at two scales."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((batch, 3, size // 16, size // 16)).repeat(16, 2).repeat(16, 3)
    fine = rng.random((batch, 3, size, size))
    return torch.from_numpy((0.7 * coarse + 0.3 * fine).astype(np.float32))
