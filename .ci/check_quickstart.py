"""Check what the quick start promises: its files, its held-out figures, its time.

python .ci/check_quickstart.py RUN_FOLDER --seconds SECONDS_IT_TOOK
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

LEAST_PSNR = 17.0
LEAST_GAIN = 1.0  # dB above the same pictures drawn as 8x8 flat cells
MOST_SECONDS = 240
MOST_DATA_WAIT = 0.05  # share of the steps' time
MOST_TOKENS, MOST_BITS, SIZE, HELD_OUT = 128, 12, [128, 128], 8


def problems(run: Path, seconds: int) -> list[str]:
    """What is not as promised, in words."""
    wanted = ["tokenizer/model.safetensors", "tokenizer/config.json"]
    wanted += [f"eval/{name}" for name in ("metrics.json", "reconstructions.png", "curves.png", "report.html")]
    wanted.append("metrics.jsonl")
    missing = [name for name in wanted if not (run / name).is_file()]
    if missing:
        return [f"missing: {', '.join(missing)}"]
    found = json.loads((run / "eval" / "metrics.json").read_text())
    psnr, flat, rate = found["figures"]["psnr"], found["baselines"]["flat_8x8_psnr"], found["rate"]
    print(f"PSNR {psnr:.2f} dB, flat cells {flat:.2f} dB, {rate['tokens_per_picture']:g} tokens, {seconds} s in all")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    wait = sum(row["data_wait"] for row in rows) / len(rows)
    print(f"{wait:.2%} of the time was spent waiting for data")
    checks = {
        f"PSNR {psnr:.2f} is below {LEAST_PSNR}": psnr >= LEAST_PSNR,
        f"PSNR {psnr:.2f} is not {LEAST_GAIN} dB above flat cells ({flat:.2f})": psnr >= flat + LEAST_GAIN,
        f"{rate['tokens_per_picture']:g} tokens": rate["tokens_per_picture"] <= MOST_TOKENS,
        f"{rate['bits_per_token']:g} bits per token": rate["bits_per_token"] <= MOST_BITS,
        f"pictures of {found['protocol']['preprocess']['size']}": found["protocol"]["preprocess"]["size"] == SIZE,
        f"{found['pictures']} held-out pictures": found["pictures"] == HELD_OUT,
        f"{wait:.1%} of the time was spent waiting for data, more than {MOST_DATA_WAIT:.0%}": wait <= MOST_DATA_WAIT,
        f"it took {seconds} s, more than {MOST_SECONDS}": seconds <= MOST_SECONDS,
    }
    return [words for words, holds in checks.items() if not holds]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=int, default=0)
    arguments = parser.parse_args()
    if wrong := problems(arguments.run, arguments.seconds):
        sys.exit("The quick start does not keep its promises: " + "; ".join(wrong))
