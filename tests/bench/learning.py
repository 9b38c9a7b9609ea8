"""Does the tiny single-stage TiTok still learn as well as it did?

    python tests/bench/learning.py              # train three seeds, compare with the stored figures
    python tests/bench/learning.py --store      # the same, and store the figures as the new ones

Trains `recipes/titok/tiny_single.yaml` for a fixed number of steps from stated seeds and measures PSNR on the held-out
photographs. Exit code 1 if the mean fell by more than the spread between seeds that was seen when the figures were
stored, so a change that hurts learning shows in one command. About a minute of one CPU core.
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
STEPS = 100


def psnr_of(seed: int, folder: Path) -> float:
    """Held-out PSNR in dB after `STEPS` steps from a seed."""
    from vistok.train.loop import train
    from vistok.train.recipe import load

    out = folder / str(seed)
    fixed = [
        f"train.steps={STEPS}",
        f"train.seed={seed}",
        f"train.out={out}",
        "train.save_every=0",
        "train.trackers=[]",
    ]
    train(load(RECIPE, [*fixed, "train.precision=fp32", "eval.metrics=[psnr]"]))
    found: float = json.loads((out / "eval" / "metrics.json").read_text())["figures"]["psnr"]
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="keep the figures as the new reference")
    store = parser.parse_args().store
    with tempfile.TemporaryDirectory() as folder:
        found = [psnr_of(seed, Path(folder)) for seed in SEEDS]
    mean, spread = statistics.mean(found), max(found) - min(found)
    print(f"PSNR after {STEPS} steps, seeds {SEEDS}: {', '.join(f'{f:.3f}' for f in found)}; mean {mean:.3f} dB")
    if store:
        STORED.write_text(
            json.dumps({"steps": STEPS, "seeds": SEEDS, "psnr": found, "spread": spread}, indent=1) + "\n"
        )
        return 0
    reference = json.loads(STORED.read_text())
    before, allowed = statistics.mean(reference["psnr"]), reference["spread"]
    print(f"Stored mean {before:.3f} dB, spread between seeds {allowed:.3f} dB; changed by {mean - before:+.3f} dB.")
    return int(mean < before - allowed)


if __name__ == "__main__":
    sys.exit(main())
