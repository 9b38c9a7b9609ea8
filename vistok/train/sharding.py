"""FSDP: a model's parameters, gradients and optimiser state cut into shards, as Accelerate's configuration says.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap Block
        -m vistok train RECIPE

(one line; without the second one the whole model is one shard group, which saves less memory).

The first part of a step, the model, is sharded; further parts (discriminators) are small, stay whole on every process
and have their gradients averaged. Parameters are float32 and the forward pass runs under autocast, as without FSDP:
Accelerate's own mixed precision would round code books to bfloat16. Checkpoints hold whole tensors, so any number of
processes, with FSDP or without, continues them. On a CPU, where Accelerate reads the configuration and leaves FSDP
off, the same command shards over gloo: slow, and enough to try a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vistok.config import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


def switch_on(accelerator: Accelerator) -> bool:
    """Make Accelerate shard if its configuration asks for FSDP; whether it does.

    Raises:
        ConfigError: The first version of FSDP, or settings that vistok has keys of its own for.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError("Accelerate is configured for FSDP 1; vistok shards with FSDP 2. Add --fsdp_version 2.")
    if plugin.activation_checkpointing:
        raise ConfigError(
            "Accelerate is configured for activation checkpointing. Leave it off there and set "
            "train.gradient_checkpointing=true."
        )
    plugin.mixed_precision_policy = None  # see the module's docstring
    plugin.cpu_ram_efficient_loading = False  # every process has built the same weights
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    return True


class Replicated(DistributedDataParallel):
    """Data parallel with FSDP's switch, so that `Accelerator.accumulate` takes both kinds."""

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None:
        """Whether the next backward pass averages gradients over the processes."""
        self.require_backward_grad_sync = requires_gradient_sync


def prepare(
    accelerator: Accelerator,
    trained: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    *,
    unused: bool,
) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
    """Shard the first module with its optimiser, replicate the others.

    Args:
        accelerator: After `switch_on`.
        trained: Modules by part, the one to shard first.
        optimizers: The optimiser of each.
        unused: Whether some parameters of the others may get no gradient.
    """
    first, *others = trained
    modules = {name: _cast(accelerator, module) for name, module in trained.items()}
    modules[first], prepared = accelerator.prepare(modules[first], optimizers[first])
    found = {first: prepared}
    for name in others:
        device = [accelerator.device] if accelerator.device.type == "cuda" else None
        whole_module = modules[name].to(accelerator.device)
        modules[name] = Replicated(whole_module, device_ids=device, find_unused_parameters=unused)
        found[name] = accelerator.prepare_optimizer(optimizers[name])
    return modules, found


def _cast(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """The module with its forward pass under the accelerator's autocast and float32 results."""
    from accelerate.utils import convert_outputs_to_fp32

    if accelerator.mixed_precision != "no":
        under = torch.autocast(accelerator.device.type, dtype=torch.bfloat16)
        module.forward = convert_outputs_to_fp32(under(module.forward))  # type: ignore[method-assign]
    return module


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds only a part of a tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process has to call it."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]
    return full


def cut_like(tensor: Any, pattern: Tensor) -> Any:
    """This process's part of a whole tensor, cut like a parameter of the same shape; anything else is left alone."""
    if not (is_sharded(pattern) and isinstance(tensor, Tensor) and tensor.shape == pattern.shape):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = pattern.device_mesh, pattern.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(pattern.device), mesh, placements, src_data_rank=None)


def gather(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """Nested state with whole tensors; every process has to call it.

    Args:
        state: Tensors, nested in mappings, and anything else.
        keep: Off, tensors that had to be gathered are dropped at once and empty ones stand for them.
    """
    return {key: _gather(value, keep) for key, value in state.items()}


def _gather(value: Any, keep: bool) -> Any:
    if isinstance(value, Mapping):
        return gather(value, keep=keep)
    if not is_sharded(value):
        return value
    full = whole(value)
    return full.cpu() if keep else full.new_empty(0)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state of whole tensors into an optimiser, whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {i: {k: cut_like(v, parameters[i]) for k, v in entry.items()} for i, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": entries})
