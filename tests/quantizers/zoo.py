"""One small configuration of every quantizer kind, and helpers to feed them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vistok
from vistok.quantizers.base import Quantizer

ZOO: dict[str, dict] = {
    "vq": {"name": "vq", "codebook_size": 64, "dim": 8},
    "vq_l2": {"name": "vq", "codebook_size": 64, "dim": 8, "l2_norm": True},
    "vq_rotation": {"name": "vq", "codebook_size": 64, "dim": 8, "l2_norm": True, "gradient": "rotation"},
    "vq_entropy": {"name": "vq", "codebook_size": 64, "dim": 8, "entropy_weight": 0.1},
    "vq_stochastic": {"name": "vq_stochastic", "codebook_size": 64, "dim": 8},
    "cvq": {"name": "cvq", "codebook_size": 64, "dim": 8},
    "cvq_l2": {"name": "cvq", "codebook_size": 64, "dim": 8, "l2_norm": True},
    "vq_ema": {"name": "vq_ema", "codebook_size": 64, "dim": 8},
    "vq_ema_kmeans": {
        "name": "vq_ema",
        "codebook_size": 64,
        "dim": 8,
        "cosine": True,
        "kmeans_init": True,
        "dead_threshold": 1.0,
    },
    "ibq": {"name": "ibq", "codebook_size": 64, "dim": 8},
    "simvq": {"name": "simvq", "codebook_size": 64, "dim": 8, "frozen_dim": 6, "bias": True},
    "residual": {"name": "residual", "base": {"name": "vq", "codebook_size": 16, "dim": 8}, "layers": 3},
    "residual_lfq": {"name": "residual", "base": {"name": "lfq", "dim": 8}, "layers": 2, "level_scale": 0.5},
    "residual_dropout": {
        "name": "residual",
        "base": {"name": "vq_ema", "codebook_size": 16, "dim": 8},
        "layers": 3,
        "quantize_dropout": True,
    },
    "grouped_residual": {
        "name": "grouped_residual",
        "base": {"name": "vq", "codebook_size": 16, "dim": 4},
        "layers": 2,
        "groups": 2,
    },
    "multiscale": {"name": "multiscale", "codebook_size": 64, "dim": 8, "scales": [1, 2, 4]},
    "fsq": {"name": "fsq", "levels": [8, 8, 8, 5, 5, 5]},
    "fsq_groups": {"name": "fsq", "levels": [8, 5], "groups": 3},
    "fsq_symmetric": {"name": "fsq_symmetric", "levels": [2, 3, 4, 7]},
    "lfq": {"name": "lfq", "dim": 10},
    "group_lfq": {"name": "group_lfq", "dim": 32, "groups": 4},
    "group_lfq_per_group": {"name": "group_lfq", "dim": 12, "groups": 3, "entropy_pool": "per_group"},
    "bsq": {"name": "bsq", "dim": 18},
    "bsq_grouped": {"name": "bsq", "dim": 72, "groups": 9, "entropy_group": 9},
    "binary": {"name": "binary", "dim": 16, "num_bits": 12},
    "binary_64": {"name": "binary", "dim": 72, "num_bits": 64, "in_dim": 24},
    "ternary": {"name": "ternary", "dim": 12, "groups": 3},
    "gaussian": {"name": "gaussian", "dim": 8},
}
DISCRETE = [k for k in ZOO if k != "gaussian"]
MASKABLE = [k for k in ZOO if k != "multiscale"]


def build(kind: str, seed: int = 0, **changes) -> Quantizer:
    """The kind's small configuration, spread so that many codes are in use."""
    torch.manual_seed(seed)
    spec = {**ZOO[kind], **changes}
    q = vistok.create("quantizer", **spec)
    with torch.no_grad():
        for module in q.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.5)
            if hasattr(module, "set_codebook"):
                module.set_codebook(torch.randn_like(module.codebook) * 0.5)
            if hasattr(module, "embed"):
                module.embed.normal_(0, 0.5)
    return q


def features(q: Quantizer, batch: int = 2, n: int = 16, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, q.in_dim, generator=generator) * scale


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of any tensor an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out
