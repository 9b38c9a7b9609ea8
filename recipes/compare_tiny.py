"""Trains every small recipe for one budget of steps and tabulates what its tokenizer makes of it.

    python recipes/compare_tiny.py run                    # all recipes/*/tiny*.yaml that have no result yet
    python recipes/compare_tiny.py run wetok/tiny.yaml    # these, again
    python recipes/compare_tiny.py table                  # prints the table of recipes/README.md

Results are kept in recipes/tiny_results.json. A recipe takes part if it is called tiny*.yaml, learns pixels, and
measures PSNR, SSIM and LPIPS. Where one needs others (a proxy, a stage), the steps are
shared out evenly among all of them. Models, losses and rates are those of the recipes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "tiny_results.json"
NEEDED = {"psnr", "ssim", "lpips_alex"}
PIXELS = {"mse", "l1", "smooth_l1", "lpips", "flow", "pixels"}
STEPS, BATCH = 240, 16
COLUMNS = (
    "recipe",
    "pixels>",
    "tokens>",
    "bits>",
    "M parameters>",
    "PSNR>",
    "SSIM>",
    "LPIPS>",
    "usage>",
    "pictures/s>",
)


def recipes() -> dict[str, dict[str, Any]]:
    """Every small recipe under its name below this folder."""
    from vistok.config import read_yaml

    return {p.relative_to(FOLDER).as_posix(): read_yaml(p) for p in sorted(FOLDER.glob("*/tiny*.yaml"))}


def compared(known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The recipes whose models are compared, in order."""
    return [
        name
        for name, recipe in known.items()
        if set(recipe.get("eval", {}).get("metrics", ())) >= NEEDED and PIXELS & set(recipe["losses"])
    ]


def strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of all strings in a recipe, with the strings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, str):
        yield path, value


def chain(name: str, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The recipe behind all those whose results it starts from, in the order in which they have to run."""
    owner = {f"{recipe['train']['out']}/tokenizer": other for other, recipe in known.items()}
    needed = [owner[text] for _, text in strings(known[name]) if text in owner]
    return list(dict.fromkeys([part for other in needed for part in chain(other, known)] + [name]))


def train(name: str, known: Mapping[str, Mapping[str, Any]], work: Path, steps: int) -> Path:
    """Run a chain of recipes; returns the folder of the last one."""
    from vistok.train.loop import train as run
    from vistok.train.recipe import load

    parts, folder = chain(name, known), work
    for i, part in enumerate(parts):
        share = steps // len(parts) + (i < steps % len(parts))
        moved = [f"{key}={work}/{text}" for key, text in strings(known[part]) if text.startswith("runs/")]
        budget = [f"train.steps={share}", f"train.global_batch={BATCH}", "train.save_every=0"]
        result = run(load(FOLDER / part, [*moved, *budget]))
        folder = result.out
    return folder


def speed(tokenizer: Any, rounds: int = 5) -> float:
    """Pictures that one core encodes and decodes per second of its time: the best of some rounds of eight."""
    import torch

    images, seconds = torch.rand(8, 3, *tokenizer.preprocess.size), []
    for _ in range(rounds):
        begun = time.process_time()
        tokenizer.decode(tokenizer.encode(images))
        seconds.append(time.process_time() - begun)
    return len(images) / min(seconds)


def measure(name: str, known: Mapping[str, Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Train and evaluate one recipe's model; its row."""
    import torch

    import vistok
    from vistok.hub import count_parameters

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        begun = time.process_time()
        out = train(name, known, Path(work), steps)
        seconds = time.process_time() - begun
        tokenizer = vistok.load(out / "tokenizer")
        found = json.loads((out / "eval" / "metrics.json").read_text())
        bits = tokenizer.num_tokens * tokenizer.quantizer.bits
        return {
            "tokenizer": tokenizer.registry_name,
            "stages": len(chain(name, known)),
            "steps": steps,
            "batch": BATCH,
            "side": tokenizer.preprocess.size[0],
            "tokens": tokenizer.num_tokens,
            "bits": bits,
            "parameters": count_parameters(tokenizer),
            **{key: found["figures"][key] for key in sorted(NEEDED)},
            "usage": found["usage"].get("usage"),
            "pictures_per_core_second": speed(tokenizer),
            "training_cpu_seconds": seconds,
            "pictures": found["pictures"],
            "date": datetime.date.today().isoformat(),
        }


def stored() -> dict[str, dict[str, Any]]:
    """The results so far, by recipe."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def run(names: Sequence[str], steps: int) -> None:
    """Train the recipes, and keep each result as soon as it is there."""
    known = recipes()
    for name in names or [n for n in compared(known) if stored().get(n, {}).get("steps") != steps]:
        if name not in compared(known):
            raise SystemExit(f"{name} is not compared. These are: {', '.join(compared(known))}.")
        row = measure(name, known, steps)
        RESULTS.write_text(json.dumps(dict(sorted({**stored(), name: row}.items())), indent=2) + "\n")


def number(value: float | None, digits: int) -> str:
    """A figure as text; nothing where there is none."""
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a Markdown table, best LPIPS first."""
    from vistok.cli.show import Rows

    cells = [
        (
            f"[{name.removesuffix('.yaml')}]({name})" + (f", {row['stages']} runs" if row["stages"] > 1 else ""),
            str(row["side"]),
            str(row["tokens"]),
            number(row["bits"], 0) if row["bits"] else "continuous",
            number(row["parameters"] / 1e6, 2),
            number(row["psnr"], 2),
            number(row["ssim"], 3),
            number(row["lpips_alex"], 3),
            f"{100 * row['usage']:.2g} %" if row["usage"] else "",
            number(row["pictures_per_core_second"], 0),
        )
        for name, row in sorted(results.items(), key=lambda item: item[1]["lpips_alex"])
    ]
    return Rows(COLUMNS, cells).markdown() + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("recipes", nargs="*", help="names below recipes/, e.g. wetok/tiny.yaml")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a whole chain")
    given = parser.parse_args()
    if given.what == "run":
        run(given.recipes, given.steps)
    else:
        print(table(stored()), end="")


if __name__ == "__main__":
    main()
