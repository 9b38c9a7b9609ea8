"""What each of two gloo processes does for `test_distributed`; importable, so that it can be spawned."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.quantizers.zoo import ZOO, build, features
from vistok.quantizers.base import Quantizer
from vistok.quantizers.ema import draw_tokens

DETERMINISTIC = [k for k in ZOO if not k.startswith(("binary", "vq_stochastic", "residual_dropout", "vq_ema_kmeans"))]
SPLITS = {"even": (2, 2), "uneven": (3, 1), "one_empty": (4, 0)}


def batch(q: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint batch of four samples and its mask, with unequal padding."""
    z = features(q, 4, 16, scale=0.5)
    return z, torch.arange(16) < torch.tensor([[16], [5], [11], [2]])


def step(q: Quantizer, z: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Loss, gradients and state after one training forward and backward."""
    z = z.clone().requires_grad_()
    if hasattr(q, "sample"):
        q.sample = False
    out = q(z, mask)
    params = [p for p in q.parameters() if p.requires_grad]
    total = out.loss + 0.0 * out.codes.sum()  # a graph also where there is no loss
    grads = torch.autograd.grad(total, [z, *params], materialize_grads=True, allow_unused=True)
    found = {"loss": out.loss.detach(), "z": grads[0]}
    found |= {f"param {i}": g for i, g in enumerate(grads[1:])}
    found |= {f"state {k}": v.clone() for k, v in q.state_dict().items()}
    found |= {f"stat {k}": v for k, v in out.stats.items()}
    return found


def share(x: torch.Tensor, split: tuple[int, int], rank: int) -> torch.Tensor:
    return x[: split[0]] if rank == 0 else x[split[0] :]


def one_step_each(rank: int | None) -> dict[str, dict[str, torch.Tensor]]:
    """One step of every deterministic kind, on the joint batch (rank None) or this process' share of it."""
    results = {}
    for kind in DETERMINISTIC:
        for name, split in SPLITS.items():
            for masked in (False, True):
                if masked and kind == "multiscale":
                    continue
                q = build(kind)
                z, mask = batch(q)
                mask = mask if masked else None
                if rank is not None:
                    z = share(z, split, rank)
                    mask = None if mask is None else share(mask, split, rank)
                results[f"{kind}/{name}/{'masked' if masked else 'whole'}"] = step(q, z, mask)
    return results


def fifty_steps(kind: str, rank: int, **changes) -> dict[str, torch.Tensor]:
    """State after 50 steps on drifting features with uneven batches; processes draw from different seeds."""
    q = build(kind, **changes)
    torch.manual_seed(100 + rank)
    for t in range(50):
        z = features(q, 1 + (t + rank) % 3, 12, seed=1000 * rank + t) + 0.1 * t
        if t % 17 == 16 and rank == 1:
            z = z[:0]
        q(z)
    return {k: v.clone() for k, v in q.state_dict().items()}


def drawn_levels(rank: int) -> torch.Tensor:
    """Numbers of levels that quantize dropout drew, from different seeds."""
    q = build("residual_dropout")
    torch.manual_seed(rank)
    return torch.tensor([q.draw_active(torch.zeros(1), None) for _ in range(20)])


def drawn_tokens(rank: int) -> torch.Tensor:
    """32 tokens drawn from 20 + 30 numbered ones, by processes with different seeds."""
    torch.manual_seed(rank)
    own = torch.arange(20.0) if rank == 0 else torch.arange(20.0, 50.0)
    return draw_tokens(own.unsqueeze(1), torch.ones(len(own), dtype=torch.bool), 32, None).squeeze(1)


def ddp_gradient(rank: int) -> torch.Tensor:
    """Gradient of the codebook under DistributedDataParallel."""
    q = build("vq_entropy")
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(q))
    z, _ = batch(q)
    wrapped(share(z, (3, 1), rank)).loss.backward()
    grad = wrapped.module.embedding.weight.grad
    assert grad is not None
    return grad


def work(rank: int, folder: str) -> None:
    """Everything one process does; the results are saved as rank{0,1}.pt."""
    torch.set_num_threads(1)
    early = build("lfq")  # built before the process group exists
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    z, _ = batch(early)
    results = {"steps": one_step_each(rank), "early": step(early, share(z, (2, 2), rank), None)}
    dist.barrier()
    began = time.monotonic()
    results |= {
        "vq_ema": fifty_steps("vq_ema", rank, dead_threshold=1.0, kmeans_init=True, decay=0.5),
        "cvq": fifty_steps("cvq", rank),
        "residual_dropout": fifty_steps("residual_dropout", rank),
    }
    dist.barrier()
    results |= {
        "seconds": time.monotonic() - began,
        "levels": drawn_levels(rank),
        "tokens": drawn_tokens(rank),
        "ddp": ddp_gradient(rank),
    }
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
