"""From a checked recipe to everything the loop needs, new or continued."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vistok import hub
from vistok.config import ConfigError, create, write_yaml
from vistok.data.augment import Augment
from vistok.data.base import Dataset, TokenDataset, fingerprint, keyed
from vistok.data.loader import Loader
from vistok.train import checkpoint, launch, optim, sharding
from vistok.train.checkpoint import Snapshot
from vistok.train.ema import EMA
from vistok.train.guard import Guard
from vistok.train.log import available_trackers
from vistok.train.recipe import LoaderConfig, Recipe, TrainConfig
from vistok.train.source import open_data, refuse_other_data, warn_of_missing_captions
from vistok.train.steps.base import Losses, Step

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Run:
    """A run in memory.

    Attributes:
        recipe: The checked recipe.
        accelerator: Device, precision, processes.
        task: The step object; `task.trained` holds the prepared modules.
        bare: The same modules without wrappers.
        optimizers: Prepared optimiser of every part.
        loader: The data.
        data_id: Fingerprint of the data set.
        ema: Averages of the first part, None for none.
        guard: Skips non-finite steps.
        step: Steps finished.
        seconds: Seconds spent on them, over all continuations.
        resumed: Step it was continued at, None for a new run.
        frozen: Parts of the model that stand still.
        sharded: Whether FSDP holds the model in parts, see `vistok.train.sharding`.
    """

    recipe: Recipe
    accelerator: Accelerator
    task: Step
    bare: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    loader: Loader
    data_id: str
    ema: EMA | None
    guard: Guard
    step: int = 0
    seconds: float = 0.0
    resumed: int | None = None
    frozen: list[nn.Module] = field(default_factory=list)
    sharded: bool = False

    def train_mode(self) -> None:
        """Put the model into training mode, and what `train.freeze` names into evaluation mode."""
        self.model.train()
        for part in self.frozen:
            part.eval()

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return self.recipe.train.out

    @property
    def model(self) -> Any:
        """What the run is for: the first part's module, without wrappers."""
        return self.bare[self.task.parts[0]]

    @property
    def spent(self) -> float:
        """Share of the time limit that is over; 0 without a limit."""
        limit = self.recipe.train.max_seconds
        return min(self.seconds / limit, 1.0) if limit else 0.0


def start(recipe: Recipe) -> Run:
    """Build a run; continue it if its folder holds a checkpoint of the same recipe.

    Raises:
        ConfigError: The folder holds a run of another recipe, or the data set changed.
        CheckpointError: Every checkpoint in the folder is damaged.
        ValueError: Something in the recipe does not fit the model or the data.
    """
    config = recipe.train
    found = _find(recipe)
    accelerator = _accelerator(recipe)
    sharded = sharding.switch_on(accelerator)
    _refuse_unsharded(recipe, sharded)
    dataset = open_data(recipe.data, "data")
    torch.manual_seed(config.seed)
    task: Step = create("step", **config.step)
    refuse_other_data(f"data.name: the step {task.registry_name!r}", task.reads, recipe.data, dataset)
    if recipe.eval.data is not None:  # built now, so that a wrong path is told before the training, not after it
        refuse_other_data(
            "eval.data.name: an evaluation", "pictures", recipe.eval.data, open_data(recipe.eval.data, "eval.data")
        )
    task.setup(_model(recipe, task), Losses(recipe.losses))
    if accelerator.is_main_process:
        warn_of_missing_captions(task.trained[task.parts[0]], recipe.data, dataset)
    frozen = optim.freeze(task.trained[task.parts[0]], config.freeze)
    optimizers = {name: recipe.optims[name].build(module) for name, module in task.trained.items()}
    bare = dict(task.trained)
    loader = _loader(recipe, dataset, bare[task.parts[0]], accelerator)
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        task=task,
        bare=bare,
        optimizers=optimizers,
        loader=loader,
        data_id=fingerprint(dataset),
        ema=None,
        guard=Guard(config.max_bad_steps),
        frozen=frozen,
        sharded=sharded,
    )
    run.train_mode()
    if found is not None:
        _load_modules(run, found)
    _prepare(run)
    run.ema = EMA(run.model, config.ema) if config.ema else None
    if found is not None:
        _continue(run, found)
    accelerator.init_trackers("tensorboard")  # it writes into the folder, which a refused recipe must not leave behind
    if accelerator.is_main_process:
        config.out.mkdir(parents=True, exist_ok=True)
        write_yaml(recipe.resolved(), config.out / checkpoint.RECIPE)
    return run


def snapshot(run: Run) -> Snapshot:
    """Everything of a run, to be saved by the first process; every process has to call it."""
    from vistok.evaluate.protocol import git_commit, versions

    keep = run.accelerator.is_main_process
    modules = {name: sharding.gather(module.state_dict(), keep=keep) for name, module in run.bare.items()}
    if run.ema is not None:
        modules["ema"] = sharding.gather(run.ema.state_dict(), keep=keep)
    facts = {
        "seconds": run.seconds,
        "ema_updates": run.ema.updates if run.ema else 0,
        "skipped_steps": run.guard.total,
        "data": run.data_id,
        "processes": run.accelerator.num_processes,
        "versions": versions(),
        "git": git_commit(),
    }
    return Snapshot(
        step=run.step,
        modules=modules,
        optimizers={name: sharding.gather(o.state_dict(), keep=keep) for name, o in run.optimizers.items()},
        extra=run.task.state(),
        facts=facts,
        recipe=run.recipe.resolved(),
    )


def seed_noise(run: Run, micro: int) -> torch.Generator:
    """Seed every generator for one forward pass from (seed, step, process, place in the step).

    Noise then needs no saved state: a continued run draws what the uninterrupted one would have drawn.

    Returns:
        The generator to hand to models, on the run's device.
    """
    accelerator = run.accelerator
    rng = keyed(run.recipe.train.seed, "noise", run.step, accelerator.process_index, micro)
    first, second, third = (int(n) for n in rng.integers(0, 2**32, 3))
    torch.manual_seed(first)
    random.seed(second)
    np.random.seed(second)
    return torch.Generator(accelerator.device).manual_seed(third)


def precision(config: TrainConfig, device: torch.device) -> str:
    """`bf16` or `no`, as Accelerate calls them; `auto` looks at the hardware."""
    if config.precision != "auto":
        return "bf16" if config.precision == "bf16" else "no"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return "bf16" if native else "no"


def _find(recipe: Recipe) -> Snapshot | None:
    """The checkpoint to continue from, after a check that it belongs to this recipe."""
    config = recipe.train
    used = checkpoint.folders(config.out)
    if not used:
        return None
    if config.resume == "never":
        raise ConfigError(
            f"{config.out} holds {used[-1].name} already and train.resume is never. Choose another train.out."
        )
    found = checkpoint.newest(config.out)
    assert found is not None
    changed = recipe.differences(found.recipe)
    if changed and config.resume == "auto":
        raise ConfigError(
            f"{config.out} holds a run of another recipe. {'; '.join(changed)}. Choose another train.out, or continue "
            f"anyway with train.resume=anyway."
        )
    return found


def _accelerator(recipe: Recipe) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration

    from vistok.train.recipe import step_class

    config = recipe.train
    AcceleratorState._reset_state()  # a second run in one Python process may use another precision
    state = launch.join()
    unused = step_class(config.step).unused_parameters
    folder = ProjectConfiguration(project_dir=str(config.out), logging_dir=str(config.out))
    accelerator = Accelerator(
        mixed_precision=precision(config, state.device),
        log_with=(available_trackers(config.trackers) if state.is_main_process else None) or None,
        project_config=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"Accelerate is configured for {accelerator.distributed_type.value}; vistok trains with data parallelism "
            f"or FSDP. Start it with accelerate launch --multi_gpu or --use_fsdp, or change the configuration."
        )
    accelerator.gradient_accumulation_steps = accumulation(config, accelerator.num_processes)
    return accelerator


def _refuse_unsharded(recipe: Recipe, sharded: bool) -> None:
    """Refuse what FSDP cannot do: it has the weights whole only inside the model's own forward pass."""
    refused = {
        "train.compile": recipe.train.compile,
        "train.step.adaptive": bool(recipe.train.step.get("adaptive")),
        "optim.name=muon": any(optim.name_of(o) == "muon" for o in recipe.optims.values()),
    }
    named = [key for key, given in refused.items() if given and sharded]
    if named:
        raise ConfigError(f"{', '.join(named)}: not together with FSDP. Leave it out, or start without --use_fsdp.")


def accumulation(config: TrainConfig, processes: int) -> int:
    """Forward passes per step of one process: the fewest that keep within `train.batch` and are of equal size."""
    if config.global_batch % processes:
        raise ConfigError(f"train.global_batch: {config.global_batch} cannot be divided among {processes} processes.")
    share = config.global_batch // processes
    least = -(-share // (config.batch or share))
    return next(n for n in range(least, share + 1) if share % n == 0)


def _model(recipe: Recipe, task: Step) -> nn.Module:
    config = recipe.train
    model: Any = create(task.model_kind, **recipe.model)
    if config.init_from is not None:
        import vistok

        model.start_from(vistok.load(config.init_from), config.init_from)
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    return model


def _checkpoint_activations(model: nn.Module) -> None:
    stacks = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    if not stacks:
        raise ConfigError(
            f"train.gradient_checkpointing: {type(model).__name__} has no transformer to recompute. Leave it out, and "
            f"lower train.batch to save memory."
        )
    for stack in stacks:
        stack.gradient_checkpointing = True


def _augment(cut: LoaderConfig, model: nn.Module) -> Augment:
    """How the recipe wants pictures cut for a model."""
    return Augment(
        size=_size(cut, model),
        crop=cut.crop,
        scale=cut.scale,
        ratio=cut.ratio,
        flip=cut.flip,
        resample=cut.resample,
        channels=getattr(getattr(model, "preprocess", None), "channels", 3),
    )


def _loader(recipe: Recipe, dataset: Dataset | TokenDataset, model: nn.Module, accelerator: Accelerator) -> Loader:
    config, cut = recipe.train, recipe.loader
    return Loader(
        dataset,
        None if isinstance(dataset, TokenDataset) else _augment(cut, model),
        seed=config.seed,
        global_batch=config.global_batch,
        accumulation=accelerator.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=cut.workers,
        prefetch=cut.prefetch,
        cache_mb=cut.cache_mb,
        device=accelerator.device,
    )


def _size(cut: LoaderConfig, model: Any) -> tuple[int, int]:
    if cut.image_size is None and not hasattr(model, "preprocess"):
        raise ConfigError(f"data.image_size: a {type(model).__name__} has no picture size of its own. Give the host's.")
    if cut.image_size is None:
        size: tuple[int, int] = tuple(model.preprocess.size)
        return size
    return (cut.image_size, cut.image_size) if isinstance(cut.image_size, int) else cut.image_size


def _prepare(run: Run) -> None:
    """Wrap modules and optimisers for device, precision and processes."""
    accelerator, task = run.accelerator, run.task
    if run.recipe.train.compile:
        _compile(run.model)
    task.helpers.to(accelerator.device)
    if run.sharded:
        task.probe = None  # its gradient is not to be had: weights are whole only inside the forward pass
        task.trained, run.optimizers = sharding.prepare(
            accelerator, task.trained, run.optimizers, unused=task.unused_parameters
        )
        return
    names = list(task.trained)
    prepared = accelerator.prepare(*task.trained.values(), *run.optimizers.values())
    task.trained = dict(zip(names, prepared[: len(names)]))
    run.optimizers = dict(zip(run.optimizers, prepared[len(names) :]))


def _compile(model: nn.Module) -> None:
    """Compile a model in place (the names of its weights stay), so that gradients can be taken twice."""
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # gradient norms per loss and adaptive weights come before the backward pass
    model.compile()


def _load_modules(run: Run, found: Snapshot) -> None:
    """Put a snapshot's weights into freshly built modules, before they are wrapped or cut."""
    if found.facts["data"] != run.data_id and run.recipe.train.resume != "anyway":
        raise ConfigError(
            f"data: the data set is not the one that {run.out} was trained on (files were added, removed or renamed). "
            f"Choose another train.out, or continue anyway with train.resume=anyway."
        )
    source = f"The checkpoint of step {found.step} in {run.out}"
    for name, module in run.bare.items():
        if name not in found.modules:
            raise ConfigError(f"{source} has no {name}. Start anew in another train.out, with train.init_from.")
        hub.load_strictly(module, found.modules[name], source)


def _continue(run: Run, found: Snapshot) -> None:
    """Put the rest of a snapshot into a prepared run."""
    facts: Mapping[str, Any] = found.facts
    for name, optimizer in run.optimizers.items():
        sharding.load_optimizer(optimizer, found.optimizers[name])
    if run.ema is not None and "ema" in found.modules:
        run.ema.load_state_dict(found.modules["ema"], facts["ema_updates"])
    run.task.load_state(found.extra)
    run.step, run.seconds, run.guard.total = found.step, facts["seconds"], facts["skipped_steps"]
    run.resumed = found.step
