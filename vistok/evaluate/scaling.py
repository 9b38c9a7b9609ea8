"""How error falls with visual tokens and with the size of the language model: the law, its fit, its frontier.

Error(N, T) = A / (N^alpha T^beta) + D, N in billions of parameters, T visual tokens ("Inference Optimal VLMs Need Only
One Visual Token", arXiv 2411.03312, eq. 3); inference takes 2 N (Q + T) FLOPs with Q text tokens.

    law = fit(read_runs("runs.csv"))
    choices = frontier(law, sizes=[0.5, 1.8, 4, 7], tokens=[1, 4, 16, 36, 64, 144, 576], text=50)
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COLUMNS = ("params", "tokens", "error")
OFFSETS = np.linspace(0.0, 0.3, 31)
"""What is tried for D where it is free; with D below 0 the fit has no end (A and D run away against each other)."""


@dataclass(frozen=True)
class Run:
    """One trained model: billions of parameters, visual tokens, error in (0, 1)."""

    params: float
    tokens: float
    error: float


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        scale: A.
        alpha: Exponent of the parameters.
        beta: Exponent of the tokens.
        offset: D.
        squares: Sum of squared errors of the fit.
        worst: Largest absolute error of the fit.
        runs: Runs it was fitted to.
    """

    scale: float
    alpha: float
    beta: float
    offset: float
    squares: float = 0.0
    worst: float = 0.0
    runs: int = 0

    def error(self, params: float, tokens: float) -> float:
        """Predicted error of a model of `params` billions with so many visual tokens."""
        return self.scale * params**-self.alpha * tokens**-self.beta + self.offset

    def __str__(self) -> str:
        ratio = self.beta / self.alpha if self.alpha else math.nan
        return (
            f"error = {self.scale:.3f} / (N^{self.alpha:.4f} T^{self.beta:.4f}) + {self.offset:.3f}   "
            f"(beta / alpha {ratio:.2f}; {self.runs} runs, largest error {self.worst:.4f})"
        )


@dataclass(frozen=True)
class Choice:
    """A model and its cost: FLOPs of one prompt, predicted error."""

    params: float
    tokens: float
    flops: float
    error: float


def read_runs(path: str | Path) -> list[Run]:
    """Read a CSV with the columns `params` (billions), `tokens` and `error` (or `score`, which is 1 - error).

    Raises:
        FileNotFoundError: No such file.
        ValueError: A missing column, or a line that is not three positive numbers; names the line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no table of runs {str(path)!r}.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets begin their files with a mark
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no table: it is not written in UTF-8.") from None
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    names = [name.strip() for name in next(rows, [])]
    if not {"params", "tokens"} <= set(names) or not {"error", "score"} & set(names):
        raise ValueError(f"{path}: expected the columns params, tokens and error (or score), got {names}.")
    found = []
    for cells in filter(None, rows):
        row = dict(zip(names, cells))
        try:
            if len(cells) != len(names):
                raise ValueError
            error = float(row["error"]) if "error" in names else 1 - float(row["score"])
            run = Run(float(row["params"]), float(row["tokens"]), error)
        except ValueError:
            raise ValueError(f"{path}, line {rows.line_num}: expected {len(names)} numbers, got {cells}.") from None
        if not (0 < run.params < math.inf and 0 < run.tokens < math.inf and 0 < run.error < 1):
            raise ValueError(
                f"{path}, line {rows.line_num}: params and tokens are above 0 and finite, the error in (0, 1)."
            )
        found.append(run)
    return found


def fit(runs: Sequence[Run], offset: float | None = 0.0) -> Law:
    """Least squares on the error itself (Gauss-Newton from the log-linear solution).

    Args:
        runs: At least as many as there are unknowns, of several sizes and several numbers of tokens.
        offset: D. None looks for it in [0, 0.3] as the released code does; the published 28 points do not determine it,
            so quote beta / alpha rather than D.

    Raises:
        ValueError: Too few runs, runs of one size or one number of tokens, or tokens that grow with size on one line.
    """
    table = np.array([(r.params, r.tokens, r.error) for r in runs], dtype=np.float64)
    if len(runs) < 4 or any(len(set(column)) < 2 for column in table[:, :2].T):
        raise ValueError("A law needs at least 4 runs, of more than one size and more than one number of tokens.")
    if np.linalg.matrix_rank(_design(table)) < 3:
        raise ValueError("Tokens and sizes grow together in these runs, so they cannot be told apart. Add other pairs.")
    if offset is not None:
        return _fit(table, offset)
    smallest = table[:, 2].min()
    return min((_fit(table, float(d)) for d in OFFSETS if d < smallest), key=lambda law: law.squares)


def _design(table: np.ndarray) -> np.ndarray:
    """What log A, alpha and beta are multiplied by, (runs, 3)."""
    return np.column_stack([np.ones(len(table)), -np.log(table[:, 0]), -np.log(table[:, 1])])


def _fit(table: np.ndarray, offset: float) -> Law:
    x = _design(table)
    wanted = table[:, 2] - offset
    if wanted.min() <= 0:
        raise ValueError(f"offset={offset} is not below the smallest error, {table[:, 2].min():.4g}.")
    theta = np.linalg.lstsq(x, np.log(wanted), rcond=None)[0]
    for _ in range(50):
        predicted = np.exp(x @ theta)
        change = np.linalg.lstsq(x * predicted[:, None], wanted - predicted, rcond=None)[0]
        theta = theta + change
        if np.abs(change).max() < 1e-12:
            break
    missed = wanted - np.exp(x @ theta)
    return Law(
        scale=math.exp(theta[0]),
        alpha=float(theta[1]),
        beta=float(theta[2]),
        offset=offset,
        squares=float((missed**2).sum()),
        worst=float(np.abs(missed).max()),
        runs=len(table),
    )


def flops(params: float, tokens: float, text: float) -> float:
    """FLOPs of a prompt of visual and text tokens through a model of `params` billions, 2 N (Q + T)."""
    return 2e9 * params * (text + tokens)


def frontier(law: Law, *, sizes: Sequence[float], tokens: Sequence[float], text: float) -> list[Choice]:
    """Choices that no cheaper one matches, by rising cost.

    Args:
        law: Fitted law.
        sizes: Candidate models, billions of parameters.
        tokens: Candidate numbers of visual tokens.
        text: Text tokens of a prompt, Q.
    """
    choices = sorted(
        (Choice(n, t, flops(n, t, text), law.error(n, t)) for n in sizes for t in tokens),
        key=lambda c: (c.flops, c.error),
    )
    best, found = math.inf, []
    for choice in choices:
        if choice.error < best:
            best = choice.error
            found.append(choice)
    return found


def plan(
    law: Law, budget: float, *, sizes: Sequence[float], tokens: Sequence[float], text: float, extra: float = 0.0
) -> Choice:
    """The choice of least error within a budget.

    Args:
        law: Fitted law.
        budget: FLOPs of one prompt.
        sizes: Candidate models, billions of parameters.
        tokens: Candidate numbers of visual tokens.
        text: Text tokens of a prompt, Q.
        extra: FLOPs of tower and compressor.

    Raises:
        ValueError: Nothing fits; says what the cheapest choice takes.
    """
    choices = frontier(law, sizes=sizes, tokens=tokens, text=text)
    fitting = [c for c in choices if c.flops + extra <= budget]
    if not fitting:
        raise ValueError(
            f"Nothing fits into {budget:.3g} FLOPs: the cheapest choice takes {choices[0].flops + extra:.3g}."
        )
    return fitting[-1]


def plot(law: Law, runs: Sequence[Run], *, text: float, path: str | Path) -> Path:
    """Error against FLOPs: runs, the law per size, and the inference-optimal frontier; PNG, SVG or PDF."""
    from matplotlib.figure import Figure

    from vistok.hub import write_atomic

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({r.params for r in runs})
    most = max(r.tokens for r in runs)
    curve = np.geomspace(min(r.tokens for r in runs), most, 64)
    for i, size in enumerate(sizes):
        own = [r for r in runs if r.params == size]
        cost = [flops(size, t, text) for t in curve]
        axes.plot(cost, [law.error(size, t) for t in curve], color=f"C{i}", label=f"{size:g} B")
        axes.scatter([flops(size, r.tokens, text) for r in own], [r.error for r in own], color=f"C{i}", s=18)
    best = frontier(law, sizes=sizes, tokens=sorted({r.tokens for r in runs}), text=text)
    axes.plot(
        [c.flops for c in best], [c.error for c in best], "k--", marker="o", markerfacecolor="none", label="optimal"
    )
    axes.set_xscale("log")
    axes.set_xlabel(f"FLOPs of a prompt with {text:g} text tokens")
    axes.set_ylabel("error")
    axes.set_title(f"alpha {law.alpha:.3f}, beta {law.beta:.3f}")
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format=Path(path).suffix[1:].lower() or "png", dpi=150)
    write_atomic(path, data.getvalue())
    return Path(path)
