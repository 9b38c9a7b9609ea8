"""`vistok scaling`: the law of visual tokens and model size, from a table of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vistok.cli import files


def scaling(
    runs: Annotated[Path, typer.Argument(help="CSV with the columns params (billions), tokens and error or score.")],
    out: Annotated[Path, typer.Option(help="Diagram (PNG, SVG or PDF).", callback=files.diagram)] = Path("scaling.png"),
    text: Annotated[float, typer.Option(min=0, help="Text tokens of a prompt.")] = 50,
    budget: Annotated[float | None, typer.Option(help="FLOPs of a prompt: print the best choice within it.")] = None,
    free_offset: Annotated[bool, typer.Option(help="Look for the offset D in [0, 0.3] instead of 0.")] = False,
) -> None:
    """Fit error = A / (N^alpha T^beta) + D, and draw which model with how many visual tokens is best at any cost."""
    from vistok.evaluate import scaling as module

    table = module.read_runs(runs)
    law = module.fit(table, None if free_offset else 0.0)
    typer.echo(str(law))
    sizes, tokens = sorted({r.params for r in table}), sorted({r.tokens for r in table})
    if budget is not None:
        best = module.plan(law, budget, sizes=sizes, tokens=tokens, text=text)
        typer.echo(f"best within {budget:.3g} FLOPs: {best.params:g} B with {best.tokens:g} tokens, {best.error:.3f}")
    files.make_folders([out])
    typer.echo(f"Wrote {module.plot(law, table, text=text, path=out)}")
