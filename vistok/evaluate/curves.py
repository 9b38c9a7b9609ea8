"""Curves of a training run, as one PNG or as small vector pictures for the report."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777")
MOST_POINTS = 600  # of a drawn line; longer ones are averaged in equal bins


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One diagram.

    Attributes:
        title: Its heading.
        series: Label -> points (x, y); points that are not finite are left out.
        x_label: Name of the x axis.
        unit: Unit of y.
        log: Logarithmic y axis; None decides by the data (`wants_log`).
    """

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str = "step"
    unit: str = ""
    log: bool | None = None


UNLIKE = ("quantizer",)
"""Parts before a `/` whose keys have scales of their own: usage, perplexity and age of dead codes."""


def curves_from_log(
    records: Iterable[Mapping[str, Any]], *, keys: Sequence[str] | None = None, x: str = "step"
) -> list[Curve]:
    """Diagrams from the lines of `metrics.jsonl`.

    Keys with the same part before the first `/` share a diagram (`loss/mse`, `loss/lpips`), unless their values are not
    alike (`UNLIKE`); the others get one each.
    Values that are no numbers are skipped.

    Args:
        records: The lines, each with the key `x`.
        keys: Keys to draw, in order; a prefix such as `loss/` takes all below it. None draws every numeric key.
        x: Key of the x axis.

    Returns:
        One `Curve` per diagram, in the order of first appearance (or of `keys`).
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if _is_number(record.get(x)):
            for key, value in record.items():
                if key != x and _is_number(value):
                    found.setdefault(key, []).append((float(record[x]), float(value)))
    if keys is not None:
        found = {
            k: found[k]
            for wanted in keys
            for k in found
            if k == wanted or (wanted[-1:] == "/" and k.startswith(wanted))
        }
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key, points in found.items():
        head, _, rest = key.partition("/")
        groups.setdefault(key if head in UNLIKE else head, {})[rest or key] = points
    return [
        Curve(title=_title(group.partition("/")[0], series), series=series, x_label=x)
        for group, series in groups.items()
    ]


def _title(head: str, series: Mapping[str, Any]) -> str:
    only = next(iter(series)) if len(series) == 1 else head
    return (head if only == head else f"{head} {only}").replace("_", " ").replace("/", " ")


def save_curves(path: str | Path, curves: Sequence[Curve], *, title: str = "") -> Path:
    """Draw all diagrams into one PNG, three beside each other; returns the path.

    Raises:
        ValueError: No diagrams.
    """
    if not curves:
        raise ValueError("There is nothing to draw: the log has no numeric series.")
    plt_figure = _figure_class()
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = plt_figure(figsize=(4.3 * columns, 2.9 * rows + (0.4 if title else 0.0)), layout="constrained", dpi=120)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left", color="#181d27")
    for index, curve in enumerate(curves):
        _draw(figure.add_subplot(rows, columns, index + 1), curve)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def curve_svg(curve: Curve) -> str:
    """One diagram as an SVG document, readable from 300 px of width on."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vistok"}):
        figure = _figure_class()(figsize=(4.3, 2.9), layout="constrained")
        _draw(figure.add_subplot(), curve)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def thin_out(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: finite ones, averaged in equal bins where there are more."""
    finite = [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)]
    if len(finite) <= most:
        return finite
    edges = [round(i * len(finite) / most) for i in range(most + 1)]
    bins = [finite[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in bins]


def smooth(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """Mean over `reach` points to both sides (fewer at the ends, the same on both sides, so nothing is shifted)."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    out = []
    for i, (x, _) in enumerate(points):
        r = min(reach, i, len(points) - 1 - i)
        out.append((x, (sums[i + r + 1] - sums[i - r]) / (2 * r + 1)))
    return out


def is_noisy(points: Sequence[tuple[float, float]]) -> bool:
    """Whether a line goes up and down so much that its course has to be drawn on top of it."""
    ys = [y for _, y in points]
    travelled = sum(abs(b - a) for a, b in itertools.pairwise(ys))
    return len(ys) > 60 and travelled > 3.0 * (max(ys) - min(ys))


def wants_log(series: Sequence[Sequence[float]]) -> bool:
    """Whether a linear axis would hide something: values squeezed to its floor, or series of very different size."""
    pooled = sorted(itertools.chain.from_iterable(series))
    if not pooled or pooled[0] <= 0 or pooled[-1] < 30.0 * pooled[0]:
        return False
    medians = [statistics.median(s) for s in series if s]
    squeezed = statistics.median(pooled) < 0.15 * pooled[-1]
    return squeezed or max(medians) > 8.0 * min(medians)


def _figure_class() -> Any:
    """The Figure class without pyplot: it saves with the Agg and SVG back ends and touches no global state."""
    from matplotlib.figure import Figure

    return Figure


def _draw(axis: Axes, curve: Curve) -> None:
    lines = {label: thin_out(points) for label, points in curve.series.items()}
    lines = {label: points for label, points in lines.items() if points}
    for colour, (label, points) in zip(itertools.cycle(COLOURS), lines.items()):
        if is_noisy(points):
            axis.plot(*zip(*points), color=colour, linewidth=0.8, alpha=0.3)
            points = smooth(points, len(points) // 40)
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(points) <= 25 else {}
        axis.plot(*zip(*points), color=colour, linewidth=1.6, label=label, **marker)
    if curve.log or (curve.log is None and wants_log([[y for _, y in points] for points in lines.values()])):
        axis.set_yscale("log")
    _style(axis, curve)


def _style(axis: Axes, curve: Curve) -> None:
    heading = f"{curve.title} [{curve.unit}]" if curve.unit else curve.title
    axis.set_title(heading, fontsize=10.5, loc="left", color="#181d27", fontweight="bold")
    axis.set_xlabel(curve.x_label, fontsize=9, color="#6b7280")
    axis.tick_params(which="both", labelsize=8.5, colors="#6b7280", length=0)
    axis.grid(True, color="#e5e7eb", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#d1d5db")
    if len(curve.series) > 1 and axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8.5, frameon=False, labelcolor="#374151")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
