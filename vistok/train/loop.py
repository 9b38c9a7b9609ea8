"""The training loop. It knows no model and no data set: what differs is the step object (`vistok.train.steps`)."""

from __future__ import annotations

import time
from contextlib import closing

import torch
from torch import Tensor

from vistok.data.base import Drawn
from vistok.train import build, checkpoint, optim, outcome, sharding
from vistok.train.build import Run
from vistok.train.guard import StopSignal, find_cause
from vistok.train.log import Log, Means, gradient_norms
from vistok.train.outcome import Reason, TrainResult
from vistok.train.recipe import Recipe
from vistok.train.steps.base import Part
from vistok.train.watch import Watch


def train(recipe: Recipe, *, command: str = "") -> TrainResult:
    """Train what a recipe says, or continue it, evaluate it and save it.

    Args:
        recipe: From `vistok.train.recipe.load`.
        command: Command line to name in the evaluation's report.

    Raises:
        ConfigError: The recipe does not fit its folder, model or data.
        CheckpointError: A checkpoint cannot be written (e.g. the disk is full) or read.
        Diverged: Too many non-finite steps in a row.

    Example:
        >>> result = train(load("recipes/quickstart.yaml", ["train.steps=100"]))
    """
    run = build.start(recipe)
    steps, batch = recipe.train.steps, recipe.train.global_batch
    log = Log(run.accelerator, run.out, steps=steps, start=run.step, seconds=run.seconds, images_per_step=batch)
    try:
        log.say(outcome.greeting(run))
        with StopSignal() as stop:
            reason = _loop(run, log, stop)
        log.close()
        return outcome.finish(run, log, reason, stop.name, command)
    finally:
        log.close()
        run.accelerator.end_training()


def _loop(run: Run, log: Log, stop: StopSignal) -> Reason:
    config, every = run.recipe.train, run.recipe.eval.every
    saved, watch = run.resumed, Watch()
    reason: Reason = "time" if run.spent >= 1 else "done"
    with closing(run.loader.steps(run.step, config.steps)) as steps:
        while run.step < config.steps and reason == "done":
            began = time.perf_counter()
            lrs = set_learning_rates(run)
            optimise(run, next(steps), log.means)
            run.step += 1
            run.seconds += time.perf_counter() - began

            reason = _agree(run, stop)
            over = reason != "done" or run.step == config.steps
            log.advance(run.step)
            if run.step % config.log_every == 0 or over:
                watch.look(log.write(run.step, run.seconds, run.loader.waited, {**lrs, **_facts(run)}))
            if every and run.step % every == 0 and not over:
                figures = outcome.evaluate(run, run.out / "eval" / f"step_{run.step:09d}", "")
                log.record({"step": run.step, **{f"eval/{name}": value for name, value in figures.items()}})
            if config.save_every and run.step % config.save_every == 0:
                saved = _save(run)
    if saved != run.step:
        _save(run)
    return reason


def optimise(run: Run, batches: list[Drawn], means: Means) -> None:
    """One step: forward and backward for every batch, an update for every part; its figures go into `means`."""
    seen: list[dict[str, Tensor]] = []
    updated: set[str] = set()
    run.guard.begin(run.bare)
    before = {name: value.clone() for name, value in run.task.state().items()}
    probing = (run.step + 1) % run.recipe.train.log_every == 0
    for micro, batch in enumerate(batches):
        generator = build.seed_noise(run, micro)
        with run.accelerator.accumulate(*run.task.trained.values()):
            for part in run.task.run(batch, run.step, generator):
                if probing and run.accelerator.sync_gradients:
                    seen.append(gradient_norms(part, run.task.probe, run.accelerator))
                run.accelerator.backward(part.loss)
                seen.append(_figures(run, part))
                if run.accelerator.sync_gradients and _update(run, part, seen):
                    updated.add(part.name)
    if run.ema is not None and run.task.parts[0] in updated:
        run.ema.update()
    if run.guard.end(run.step):
        for figures in seen:
            means.add(figures)
    else:
        run.task.load_state(before)


def _update(run: Run, part: Part, seen: list[dict[str, Tensor]]) -> bool:
    """Clip, check and step one part's optimiser; whether the step was good."""
    accelerator, module, optimizer = run.accelerator, run.bare[part.name], run.optimizers[part.name]
    clip = run.recipe.optims[part.name].clip
    trained = [p for p in module.parameters() if p.grad is not None]
    norm = sharding.whole(torch.nn.utils.get_total_norm([p.grad for p in trained]))
    good = torch.isfinite(norm) & torch.isfinite(part.loss.detach())
    if accelerator.num_processes > 1:  # one process's bad batch must be skipped by all
        good = accelerator.reduce(good.float(), "mean") == 1
    if good:
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
        optimizer.step()
        seen.append({_key(run, "grad_norm", part.name): norm})
    else:
        run.guard.refuse(part.name, find_cause({"total": part.loss, **part.terms}, module), run.step)
    optimizer.zero_grad()
    return bool(good)


def set_learning_rates(run: Run) -> dict[str, float]:
    """Give every optimiser the rate of the coming step; the rates by their names in the log."""
    rates = {}
    for name, settings in run.recipe.optims.items():
        rate = settings.lr_at(run.step, run.recipe.train.steps, run.spent)
        optim.set_lr(run.optimizers[name], rate)
        rates[_key(run, "lr", name)] = rate
    return rates


def _agree(run: Run, stop: StopSignal) -> Reason:
    """Whether to go on; the same on every process, whichever got the signal and whatever its clock says."""
    if run.accelerator.num_processes > 1:
        own = torch.tensor([float(bool(stop.name)), run.seconds], device=run.accelerator.device)
        signals, run.seconds = run.accelerator.reduce(own, "mean").tolist()
    else:
        signals = float(bool(stop.name))
    if signals:
        return "signal"
    return "time" if run.spent >= 1 else "done"


def _figures(run: Run, part: Part) -> dict[str, Tensor]:
    terms = {f"loss/{name}": term for name, term in part.terms.items()}
    return {_key(run, "loss", part.name): part.loss, **terms, **part.stats}


def _facts(run: Run) -> dict[str, float]:
    """What was left out so far, in all processes."""
    skipped = sum(run.loader.skipped.values())
    if run.accelerator.num_processes > 1:
        skipped = int(run.accelerator.reduce(torch.tensor(skipped, device=run.accelerator.device), "sum"))
    return {"skipped_steps": run.guard.total, "skipped_samples": skipped}


def _key(run: Run, name: str, part: str) -> str:
    return name if part == run.task.parts[0] else f"{name}/{part}"


def _save(run: Run) -> int:
    """Write a checkpoint (first process) and wait until it is there; returns its step.

    Raises:
        CheckpointError: On every process, if the first one could not write.
    """
    error, snapshot = "", build.snapshot(run)
    if run.accelerator.is_main_process:
        try:
            checkpoint.save(run.out, snapshot, keep=run.recipe.train.keep)
        except checkpoint.CheckpointError as err:
            error = str(err)
    if run.accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        error = broadcast_object_list([error])[0]
    if error:
        raise checkpoint.CheckpointError(error)
    return run.step
