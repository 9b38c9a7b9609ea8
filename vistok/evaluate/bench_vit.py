"""`vistok bench vit`: what reduction inside a vision transformer saves, beside the same model without it."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from vistok.evaluate import bench_selections
from vistok.registry import nearest

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"name": "tome", "r": 8},
    {"name": "tome", "r": 13},
    {"name": "tome", "r": 16},
    {"name": "turbo", "r": 13},
    {"name": "many_to_many"},
    {"name": "cascade"},
)


@dataclass(frozen=True, kw_only=True)
class VitBench:
    """Result of one run: times are minima over rounds in which the plain model and every method ran in turn.

    Attributes:
        device: What it ran on.
        threads: CPU threads.
        batch: Pictures per forward.
        rounds: Timed rounds after one warm-up.
        rows: One per model and method, the plain model first: model, method, settings, tokens (after the last block),
            gmac (of the blocks, per picture), process_ms and wall_ms (per picture; the processor seconds of this
            process, which a busy machine hardly disturbs with one thread), speedup and wall_speedup (plain / ours),
            allowed (the same of the FLOPs).
        selections: Cost of selections behind a tower, see `bench_selections`; empty unless asked for.
    """

    device: str
    threads: int
    batch: int
    rounds: int
    rows: list[dict[str, Any]]
    selections: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run(
    models: Sequence[str | nn.Module] = MODELS,
    *,
    settings: Sequence[Mapping[str, Any]] = SETTINGS,
    batch: int = 8,
    rounds: int = 7,
    threads: int | None = 1,
    device: str = "cpu",
    selections: bool = False,
) -> VitBench:
    """Time methods against the plain model, with random weights.

    Args:
        models: Names of timm (built with random weights), or models that take (B, 3, H, W).
        settings: Methods as mappings `{name: ..., ...}`.
        batch: Pictures per forward.
        rounds: Timed rounds after one warm-up.
        threads: CPU threads; torch's own number if None. Process time adds up threads: compare it with one.
        device: Where to run.
        selections: Time selections behind a CLIP-L tower as well.

    Raises:
        ValueError: A setting without a name.
    """
    if any("name" not in setting for setting in settings):
        raise ValueError(f"Every setting names its method: {{name: tome, r: 13}}. Got {list(settings)}.")
    if threads:
        torch.set_num_threads(threads)
    rows = [row for model in models for row in _model_rows(model, settings, batch, rounds, device)]
    name = (platform.processor() or platform.machine()) if device == "cpu" else torch.cuda.get_device_name(device)
    behind = bench_selections.run() if selections else []
    threads = torch.get_num_threads()
    return VitBench(device=name, threads=threads, batch=batch, rounds=rounds, rows=rows, selections=behind)


def _model_rows(
    model: str | nn.Module, settings: Sequence[Mapping[str, Any]], batch: int, rounds: int, device: str
) -> list[dict[str, Any]]:
    name = model if isinstance(model, str) else type(model).__name__
    net = _built(model).to(device)
    size = getattr(getattr(net, "patch_embed", None), "img_size", (224, 224))
    x = torch.rand(batch, 3, *size, device=device)
    every: list[Mapping[str, Any] | None] = [None, *settings]
    times: list[list[tuple[float, float]]] = [[] for _ in every]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for found, setting in zip(times, every):
                found.append(_timed(net, x, setting))
        traces = [_trace(net, x[:1], setting) for setting in every]
    best = [[min(t[k] for t in found[1:]) for k in range(2)] for found in times]
    plain = best[0]
    rows = []
    for setting, (process, wall), trace in zip(every, best, traces):
        given = dict(setting or {"name": "none"})
        rows.append(
            {
                "model": name,
                "method": given.pop("name"),
                "settings": given,
                "tokens": trace.mlp[-1],
                "gmac": trace.flops / 2e9,
                "process_ms": process / batch * 1000,
                "wall_ms": wall / batch * 1000,
                "speedup": plain[0] / process,
                "wall_speedup": plain[1] / wall,
                "allowed": trace.flops_without / trace.flops,
            }
        )
    return rows


def _built(model: str | nn.Module) -> Any:
    if isinstance(model, nn.Module):
        return model.eval()
    import timm

    if ":" not in model and not timm.is_model(model):
        raise ValueError(f"timm has no model named {model!r}. {nearest(model, timm.list_models())}")
    torch.manual_seed(0)
    return timm.create_model(model, pretrained=False).eval().requires_grad_(False)


def _applied(net: Any, setting: Mapping[str, Any] | None) -> Any:
    from vistok.plugins.attach import attach

    return contextlib.nullcontext() if setting is None else attach(net, setting)


def _timed(net: Any, x: torch.Tensor, setting: Mapping[str, Any] | None) -> tuple[float, float]:
    """(process, wall) seconds of one forward."""
    with _applied(net, setting):
        _wait(x)
        wall, process = time.perf_counter(), time.process_time()
        net(x)
        _wait(x)
        return time.process_time() - process, time.perf_counter() - wall


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _trace(net: Any, x: torch.Tensor, setting: Mapping[str, Any] | None) -> Any:
    with _applied(net, setting or {"name": "tome", "r": 0}) as plugin:
        net(x)
        return plugin.trace


def table(result: VitBench) -> str:
    """The rows as text."""
    lines = [
        f"{'model':24}{'method':16}{'settings':12}{'tokens':>7}{'GMAC':>7}{'CPU ms':>9}{'wall ms':>9}"
        f"{'CPU':>7}{'wall':>7}{'allowed':>9}"
    ]
    for r in result.rows:
        given = ", ".join(f"{k}={v}" for k, v in r["settings"].items())
        lines.append(
            f"{r['model']:24}{r['method']:16}{given:12}{r['tokens']:>7}{r['gmac']:>7.2f}{r['process_ms']:>9.1f}"
            f"{r['wall_ms']:>9.1f}{r['speedup']:>6.2f}x{r['wall_speedup']:>6.2f}x{r['allowed']:>8.2f}x"
        )
    if result.selections:
        lines.append(f"\n{'selection':20}{'reads':28}{'left':>6}{'CPU ms':>9}{'of the tower':>14}")
    for r in result.selections:
        lines.append(
            f"{r['method']:20}{', '.join(r['needs']):28}{r['left']:>6}{r['process_ms']:>9.1f}{r['share']:>13.2%}"
        )
    return "\n".join(lines)
