"""The few collectives layers, quantizers and losses need; each is the identity where no process group is initialised.

Whether several processes run is asked at call time, never remembered: a module may be built before
`torch.distributed.init_process_group`. Every message has a size that does not depend on the data of a process, so
processes with unequal (even empty) batches stay in step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


def world_size() -> int:
    """Number of processes; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_sum(x: Tensor) -> Tensor:
    """Sum of x over the processes, without gradient; x itself (detached) for one process."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone().contiguous()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def all_stack(x: Tensor) -> Tensor:
    """The tensors of all processes, equal in shape, stacked along a new first dimension: (P, ...)."""
    if world_size() == 1:
        return x.detach().unsqueeze(0)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.stack(parts)


def all_objects(x: Any) -> list[Any]:
    """Python objects of all processes, in their order; [x] for one process."""
    if world_size() == 1:
        return [x]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, x)
    return found


def of_first(call: Callable[[], Result]) -> Result:
    """The result of a call that only process 0 makes, on every process; so is its error.

    Raises:
        RuntimeError: On the other processes, with what was raised on process 0; there the error itself.
    """
    found: Any = None
    problem: Exception | None = None
    if rank() == 0:
        try:
            found = call()
        except Exception as err:  # raised below, after the others have heard of it
            problem = err
    found, said = all_objects((found, None if problem is None else str(problem)))[0]
    if problem is not None:
        raise problem
    if said is not None:
        raise RuntimeError(f"The first process failed: {said}")
    result: Result = found
    return result


@torch.no_grad()
def from_first(x: Tensor) -> Tensor:
    """The tensor of process 0, on every process."""
    if world_size() == 1:
        return x
    sent = x.detach().clone().contiguous()
    dist.broadcast(sent, src=0)
    return sent


def sum_with_local_gradient(local: Tensor) -> Tensor:
    """Sum over the processes, with the gradient that averaging gradients over processes (DDP) makes right.

    The value is the global sum S. The gradient with respect to the local part is the number of processes P, because
    DDP divides by P afterwards: S = sg(S) + P (local - sg(local)).
    """
    processes = world_size()
    if processes == 1:
        return local
    return all_sum(local) + processes * (local - local.detach())


def mean_with_local_gradient(local: Tensor) -> Tensor:
    """Mean over the processes, as a value; the gradient stays that of the local one.

    Averaging gradients over processes, as DDP does, then gives that of the global mean.
    """
    processes = world_size()
    if processes == 1:
        return local
    return local + (all_sum(local) / processes - local.detach())


class _DifferentiableSum(torch.autograd.Function):
    """All-reduce whose backward pass is an all-reduce, and so on for higher derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return differentiable_sum(gradient)


def differentiable_sum(x: Tensor) -> Tensor:
    """Sum over the processes with its full gradient: every process's loss reaches every process's x.

    For statistics that enter the local loss in a non-linear way (batch norm); the joint objective is the sum of the
    processes' losses. All processes have to run the same forward and backward passes, gradient penalties included.
    """
    if world_size() == 1:
        return x
    total: Tensor = _DifferentiableSum.apply(x)
    return total
