"""Does the tiny single-stage TiTok still learn as well as it did?

    python tests/bench/learning.py                   # train three seeds, compare with the stored figures
    python tests/bench/learning.py optim.lr=1.0e-3   # the same for a changed recipe
    python tests/bench/learning.py --store           # keep the figures as the new reference

Trains `recipes/titok/tiny_single.yaml` for 800 steps from stated seeds, with LPIPS and the discriminator at the end as
it says, and measures the held-out photographs. Exit code 1 if the mean of a figure over the seeds became worse by more
than the spread between seeds that was seen when the figures were stored: a change that hurts learning shows in one
command. About 7 minutes of one CPU core. The figures were stored on 2026-11-27; the spread of seeds is 0.04 dB. Before,
with tokens that start anywhere, they were 14.19 dB and 0.485, and a learning rate of a quarter (optim.lr=5.0e-4) was
found worse: 12.71 dB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "titok" / "tiny_single.yaml"
STORED = HERE / "learning.json"
SEEDS = (0, 1, 2)
STEPS = 800
SIGNS = {"psnr": 1, "lpips_alex": -1}
"""The figures; 1 where higher is better."""
FIXED = (
    f"train.steps={STEPS}",
    "train.precision=fp32",
    "train.save_every=0",
    "train.trackers=[]",
    f"eval.metrics=[{','.join(SIGNS)}]",
)


def train_seed(seed: int, changes: list[str], folder: Path) -> dict[str, float]:
    """Held-out figures after `STEPS` steps from a seed."""
    from vistok.train.loop import train
    from vistok.train.recipe import load

    out = folder / str(seed)
    train(load(RECIPE, [*FIXED, *changes, f"train.seed={seed}", f"train.out={out}"]))
    figures = json.loads((out / "eval" / "metrics.json").read_text())["figures"]
    return {name: figures[name] for name in SIGNS}


def compare(found: dict[str, list[float]], stored: dict[str, list[float]]) -> list[str]:
    """Names of the figures that became worse by more than the stored spread between seeds; prints one line for each."""
    worse = []
    for name, sign in SIGNS.items():
        before, spread = statistics.mean(stored[name]), max(stored[name]) - min(stored[name])
        change = statistics.mean(found[name]) - before
        if sign * change < -spread:
            worse.append(name)
        verdict = "WORSE" if name in worse else "as good"
        print(f"{name}: stored mean {before:.4f}, spread of seeds {spread:.4f}, changed by {change:+.4f}: {verdict}")
    return worse


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="key.sub=value", help="changes of the recipe to be compared")
    parser.add_argument("--store", action="store_true", help="keep the figures as the new reference")
    args = parser.parse_args()
    if args.store and args.changes:
        parser.error("--store keeps figures of the recipe as it is: leave the changes out, or change the recipe.")
    with tempfile.TemporaryDirectory() as folder:
        runs = [train_seed(seed, args.changes, Path(folder)) for seed in SEEDS]
    found = {name: [run[name] for run in runs] for name in SIGNS}
    for name, values in found.items():
        print(f"{name} after {STEPS} steps, seeds {SEEDS}: {', '.join(f'{v:.4f}' for v in values)}")
    if args.store:
        STORED.write_text(json.dumps({"steps": STEPS, "seeds": SEEDS, **found}, indent=1) + "\n")
        return 0
    return int(bool(compare(found, json.loads(STORED.read_text()))))


if __name__ == "__main__":
    sys.exit(main())
