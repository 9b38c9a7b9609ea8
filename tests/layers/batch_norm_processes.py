"""What each of two gloo processes does for `test_norm`; importable, so that it can be spawned."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from vistok.layers.norm import AllReduceBatchNorm2d

SPLITS = {"even": 3, "uneven": 5, "one_empty": 6}


def joint() -> torch.Tensor:
    """Six maps whose mean is large compared with their spread."""
    return torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(1)) + torch.arange(6.0)[:, None, None, None]


def norm(kind: type[nn.BatchNorm2d], **options) -> nn.BatchNorm2d:
    layer = kind(4, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2.0, 4))
            layer.bias.copy_(torch.linspace(-1.0, 1.0, 4))
    return layer


def two_steps(layer: nn.BatchNorm2d, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, first and second derivatives of a sum over samples, and the state after two passes."""
    x = x.clone().requires_grad_()
    layer(0.5 * x)
    out = layer(x)
    loss = (out.square() * out.detach().cos() + out.sin()).sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    total = slope.square().sum() + loss
    found = dict(zip(("weight", "bias", "x"), torch.autograd.grad(total, [layer.weight, layer.bias, x])))
    return {
        "out": out.detach(),
        "slope": slope.detach(),
        **found,
        **{f"state {k}": v for k, v in layer.state_dict().items()},
    }


def work(rank: int, folder: str) -> None:
    """Everything one process does; the results are saved as rank{0,1}.pt."""
    torch.set_num_threads(1)
    early = norm(AllReduceBatchNorm2d)  # built before the process group exists
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, cut in SPLITS.items():
        layer = early if name == "even" else norm(AllReduceBatchNorm2d)
        results[name] = two_steps(layer, joint()[:cut] if rank == 0 else joint()[cut:])
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
