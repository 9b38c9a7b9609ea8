"""What the benchmarks of vision-language models share: settings, hosts, clocks, memory, diagrams."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vistok.config import ConfigError, read_yaml, schema
from vistok.registry import registry

Now = Callable[[torch.device], float]
Budget = float | int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One method at one budget.

    Attributes:
        label: What tables call it.
        keep: Its budget; None for a method that takes none.
        method: What `vistok.attach` takes; None for the plain model.
    """

    label: str
    keep: Budget | None
    method: Mapping[str, Any] | None


PLAIN = Setting(label="none", keep=1.0, method=None)


def settings_of(methods: Sequence[str | Mapping[str, Any]], keep: Sequence[Budget]) -> list[Setting]:
    """Every method at every budget; one that takes no budget, or has a `keep` of its own, stands as it is.

    Args:
        methods: Names, mappings `{name: ..., ...}`, or YAML files with such a mapping, which lend it their names.
        keep: Budgets.
    """
    found = []
    for method in methods:
        label = Path(method).stem if isinstance(method, str) and _is_file(method) else None
        given = dict(_mapping(method))
        if "keep" not in schema(registry("method").resolve(given["name"])[1]):
            found.append(Setting(label=label or given["name"], keep=None, method=given))
            continue
        budgets = [given["keep"]] if given.get("keep") is not None else keep
        found += [Setting(label=label or given["name"], keep=b, method={**given, "keep": b}) for b in budgets]
    return found


def _is_file(method: str) -> bool:
    return method.endswith((".yaml", ".yml"))


def _mapping(method: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(method, str):
        return method
    if not _is_file(method):
        return {"name": method}
    found = read_yaml(method)
    if not isinstance(found.get("name"), str):
        raise ConfigError(f"{method}: a setting needs the name of its method, e.g. name: fastv.")
    return found


def timer(clock: str) -> Now:
    """The clock of a benchmark, `wall` or `process`.

    Raises:
        ValueError: A process clock with several threads or a GPU, or another word.
    """
    if clock not in ("wall", "process"):
        raise ValueError(f"clock: expected wall or process, got {clock!r}.")
    if clock == "process" and (torch.get_num_threads() > 1 or torch.cuda.is_available()):
        raise ValueError("The process clock adds up threads and knows no GPU: use it with threads=1 on a CPU.")
    return _now if clock == "wall" else _process_now


@contextlib.contextmanager
def applied(model: Any, method: Mapping[str, Any] | None) -> Iterator[Any]:
    """The plug-in while the block runs; None and no change without a method."""
    from vistok.plugins.attach import attach

    if method is None:
        yield None
    else:
        with attach(model, method) as plugin:
            yield plugin


def load_host(source: str | Path, dtype: str = "auto") -> Any:
    """A model from a directory, for inference.

    Raises:
        FileNotFoundError: There is none.
    """
    from transformers import AutoModelForImageTextToText

    if not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"{source} holds no model (no config.json). recipes/vlm/make_host.py makes a small one."
        )
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForImageTextToText.from_pretrained(source, dtype=chosen).eval().requires_grad_(False)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _process_now(device: torch.device) -> float:
    return time.process_time()


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache."""
    return sum(layer.keys.numel() * layer.keys.element_size() * 2 for layer in cache.layers)


def measure_peak(model: Any, call: Any) -> tuple[int, Any]:
    """Largest number of bytes allocated during a call above what was there before, and its result."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        result = call()
        return torch.cuda.max_memory_allocated(model.device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    level = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak, result


def draw(rows: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str, float]], path: Path, title: str) -> None:
    """One panel per figure against the tokens kept, one line per method, the plain model dashed.

    Args:
        rows: The plain model first.
        panels: Key of a row, label of the axis, factor.
        path: Where the picture goes.
        title: Above it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained", squeeze=False)
    labels = list(dict.fromkeys(row["method"] for row in rows[1:]))
    for axis, (key, name, factor) in zip(axes[0], panels):
        if rows[0][key] is not None:
            axis.axhline(rows[0][key] * factor, color="black", linestyle="--", linewidth=0.9, label="none")
        for index, label in enumerate(labels):
            mine = [r for r in rows if r["method"] == label and r[key] is not None]
            points = sorted((r["image_left"], r[key] * factor) for r in mine)
            style = ("-", "--", ":")[index // 10 % 3]  # ten colours come round
            axis.plot(*zip(*points), marker="o", markersize=3.5, linestyle=style, label=label)
        axis.set(xlabel="image tokens kept", ylabel=name)
        axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
