"""What a run leaves behind: the model, the evaluation, and the words about both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vistok import hub
from vistok.config import create
from vistok.data.base import Dataset, captions_of, files_of, write_files
from vistok.distributed import of_first
from vistok.train import checkpoint, sharding
from vistok.train.build import Run
from vistok.train.log import METRICS, Log, clock, history
from vistok.train.source import open_data

Reason = Literal["done", "time", "signal"]
EVALUATION = "eval"
PICTURES = "pictures"
"""Folder in the evaluation's, for held-out pictures that were no files."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run did.

    Attributes:
        out: Folder of the run.
        stopped: `done`, `time` (the limit of `train.max_seconds`), or `signal` (SIGINT or SIGTERM).
        step: Steps finished.
        resumed: Step it was continued at, None for a new run.
        seconds: Seconds of training, over all continuations.
        figures: Held-out figures and baselines by name, empty without evaluation.
        files: What was written, with one line each on what it is.
    """

    out: Path
    stopped: Reason
    step: int
    resumed: int | None
    seconds: float
    figures: dict[str, float]
    files: dict[Path, str]


def greeting(run: Run) -> str:
    """One line on model, data and machine."""
    config, accelerator = run.recipe.train, run.accelerator
    count = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    frozen = "" if trained == count else f" ({trained / 1e6:.2f} M trained)"
    where = f"{accelerator.num_processes} x {accelerator.device.type}{', sharded' * run.sharded}"
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    begins = "" if run.resumed is None else f", continued at step {run.resumed}"
    pictures = len(run.loader.reader.dataset)
    return (
        f"{run.model.registry_name}: {count / 1e6:.2f} M parameters{frozen}, "
        f"{pictures} picture{'s' * (pictures != 1)}, {config.steps} steps of {config.global_batch} on {where} in "
        f"{precision}{begins}. Folder: {run.out}"
    )


def evaluate(run: Run, folder: Path, command: str) -> dict[str, float]:
    """Figures of the averaged weights on the held-out pictures; the first process writes the report into `folder`.

    The pictures are shared among the processes: all of them have to call it.
    """
    config = run.recipe.eval
    if config.data is None:
        return {}
    from vistok.evaluate import run as evaluation

    reads_text = "text" in getattr(run.model, "options", ())
    pictures, captions = _held_out(run, open_data(config.data, "eval.data"), reads_text)
    with final_model(run) as model:
        result = evaluation.evaluate(
            model,
            pictures,
            metrics=config.metrics,
            out=folder,
            batch=config.batch,
            lengths=config.lengths,
            command=command,
            text=captions,
            history=history(run.out / METRICS),
        )
    for name, why in result.unmeasured.items() if run.accelerator.is_main_process else ():
        warnings.warn(f"eval.metrics: {name} is left out. {why}", stacklevel=2)
    run.accelerator.wait_for_everyone()
    return {**result.figures, **result.baselines}


def _held_out(run: Run, dataset: Dataset, reads_text: bool) -> tuple[Sequence[Path], dict[Path, str] | None]:
    """Files of the held-out pictures, and their captions for a model that reads them.

    Pictures that are no files (shards, tables, drawings) become some in the run's folder, so that figures name files
    that anybody can measure again.
    """
    files = files_of(dataset)
    if files is not None:
        return files, captions_of(dataset) if reads_text else None
    files, captions, broken = of_first(lambda: write_files(dataset, run.out / EVALUATION / PICTURES))
    if broken and run.accelerator.is_main_process:
        name, why = next(iter(broken.items()))
        reason = why if name in why else f"{name}: {why}"
        warnings.warn(f"eval.data: {len(broken)} left out of the evaluation, e.g. {reason}", stacklevel=2)
    return files, captions if reads_text else None


@contextmanager
def final_model(run: Run) -> Iterator[Any]:
    """The model in eval mode with its averaged weights, of a sharded one a whole copy.

    Every process has to call it.
    """
    if run.sharded:
        yield _whole_copy(run)
        return
    with run.ema.applied() if run.ema is not None else nullcontext():
        run.model.eval()
        try:
            yield run.model
        finally:
            run.train_mode()


def _whole_copy(run: Run) -> nn.Module:
    model: nn.Module = create(run.task.model_kind, **run.recipe.model)
    averages = run.ema.state_dict() if run.ema is not None else {}
    state = sharding.gather({**run.model.state_dict(), **averages}, keep=True)
    hub.load_strictly(model, state, f"The run in {run.out}")
    return model.to(run.accelerator.device).eval()


def finish(run: Run, log: Log, reason: Reason, signal: str, command: str) -> TrainResult:
    """Save the model, evaluate it, and say what was written."""
    figures: dict[str, float] = {}
    if reason != "signal":
        with final_model(run) as model:
            if run.accelerator.is_main_process:
                model.save_pretrained(run.out / run.task.model_kind)
        figures = evaluate(run, run.out / EVALUATION, command)
    files = written(run.out, run.task.model_kind)
    result = TrainResult(
        out=run.out,
        stopped=reason,
        step=run.step,
        resumed=run.resumed,
        seconds=run.seconds,
        figures=figures,
        files=files,
    )
    log.say(closing_message(result, signal))
    return result


def written(out: Path, kind: str = "tokenizer") -> dict[Path, str]:
    """What a run's folder holds now, with a few words on each; the model lies under the name of its kind."""
    known = {
        out / kind: "the trained model" + ("; vistok.load reads it" if kind in hub.KEPT else ""),
        out / METRICS: "every figure of the training",
        out / checkpoint.RECIPE: "the complete recipe",
        out / "tensorboard": "the same for TensorBoard",
    }
    newest = {folder: "the newest checkpoint" for folder in checkpoint.folders(out)[-1:]}
    report = {
        out / EVALUATION / "report.html": "everything on one page",
        out / EVALUATION / "reconstructions.png": "held-out pictures and what the tokens keep of them",
        out / EVALUATION / "ladder.png": "the same pictures from few to many tokens",
        out / EVALUATION / "curves.png": "losses and rates over the training",
        out / EVALUATION / "metrics.json": "held-out figures and what they depend on",
        out / EVALUATION / "pictures.jsonl": "the figures of each picture",
        out / EVALUATION / PICTURES: "the held-out pictures as files",
    }
    return {path: words for path, words in {**report, **known, **newest}.items() if path.exists()}


def closing_message(result: TrainResult, signal: str) -> str:
    """The last words of a run: how it ended, its figures, every file it wrote."""
    if result.stopped == "signal":
        newest = checkpoint.folders(result.out)[-1]
        return f"{signal}: stopped after step {result.step} and saved {newest}. The same command continues."
    limit = ", at its time limit" if result.stopped == "time" else ""
    lines = [f"Trained {result.step} steps in {clock(result.seconds)}{limit}."]
    if result.figures:
        lines.append("Held-out pictures: " + ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items()))
    width = max(len(str(path)) for path in result.files)
    lines += ["Wrote", *(f"  {path!s:{width}}  {words}" for path, words in result.files.items())]
    return "\n".join(lines)
