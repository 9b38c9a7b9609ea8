"""Our quantizers beside vector-quantize-pytorch: time and peak memory, forward + backward in training mode.

    python tests/bench/quantizers.py                 # up to 2^14 codes, about a minute
    python tests/bench/quantizers.py --full          # with 2^18 codes: the other library needs 12-14 GB and minutes
    python tests/bench/quantizers.py --ours --full   # ours alone at 2^18

Features are (8, 256, d). Each measurement runs in a process of its own; memory is the growth of its resident maximum.
Needs `pip install -e .[bench]` for the other library.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    # name: (bits, ours, theirs or None)
    "lfq 2^10": (10, "q('lfq', dim=10)", "vqp.LFQ(dim=10, entropy_loss_weight=.1, commitment_loss_weight=.25)"),
    "lfq 2^14": (14, "q('lfq', dim=14)", "vqp.LFQ(dim=14, entropy_loss_weight=.1, commitment_loss_weight=.25)"),
    "lfq 2^18": (18, "q('lfq', dim=18)", "vqp.LFQ(dim=18, entropy_loss_weight=.1, commitment_loss_weight=.25)"),
    "group lfq 2^64": (8, "q('group_lfq', dim=64, groups=8)", None),
    "bsq 2^36": (8, "q('bsq', dim=36)", None),
    "fsq 2^10": (10, "q('fsq', levels=[8, 5, 5, 5])", "vqp.FSQ([8, 5, 5, 5])"),
    "fsq 2^18": (10, "q('fsq', levels=[8] * 6)", "vqp.FSQ([8] * 6)"),
    "vq 2^14": (14, "q('vq', codebook_size=2**14, dim=16)", None),
    "vq 2^18": (18, "q('vq', codebook_size=2**18, dim=16)", None),
    "ema vq 2^10": (10, "q('vq_ema', codebook_size=2**10, dim=16)", "ema(2**10)"),
    "ema vq 2^14": (14, "q('vq_ema', codebook_size=2**14, dim=16)", "ema(2**14)"),
    "ema vq 2^18": (18, "q('vq_ema', codebook_size=2**18, dim=16)", "ema(2**18)"),
    "ibq 2^14": (14, "q('ibq', codebook_size=2**14, dim=16)", None),
    "ibq 2^18": (18, "q('ibq', codebook_size=2**18, dim=16)", None),
}


def measure(expression: str, repeats: int) -> dict[str, float]:
    """Build a quantizer, run it, and say what it cost (in this process)."""
    import torch

    import vistok

    if expression.startswith(("vqp", "ema")):
        import vector_quantize_pytorch as vqp

        names = {"vqp": vqp, "ema": lambda c: vqp.VectorQuantize(dim=16, codebook_size=c, rotation_trick=False)}
    else:
        names = {"q": lambda name, **config: vistok.create("quantizer", name, **config)}
    quantizer = eval(expression, names)  # the expressions above, nobody else's
    width = getattr(quantizer, "in_dim", None) or getattr(quantizer, "dim", 16)
    before = peak_mb()
    wall: list[float] = []
    cpu: list[float] = []
    while len(cpu) < repeats or (
        repeats > 1 and sum(cpu) < 0.3
    ):  # the cheap ones often, so that the best is no accident
        seed = len(cpu)
        z = torch.randn(8, 256, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        start = time.perf_counter(), time.process_time()
        out = quantizer(z)
        codes, loss = (out.codes, out.loss) if hasattr(out, "codes") else (out[0], out[2] if len(out) > 2 else 0)
        (codes.sum() + loss).sum().backward()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"seconds": min(wall), "cpu_seconds": min(cpu), "peak_mb": peak_mb() - before}


def peak_mb() -> float:
    """The most memory that this process ever had, in MB.

    Of the kernel's two figures the one in /proc: a new process begins the other, `ru_maxrss`, at its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_apart(expression: str, repeats: int) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--one", expression, "--repeats", str(repeats)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(found.splitlines()[-1])
    return result


def main() -> None:
    """Measure all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also 2^18 codes")
    parser.add_argument("--ours", action="store_true", help="leave the other library out")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.repeats)))
        return
    results = {}
    print(f"{'case':16} {'ours s':>9} {'cpu s':>8} {'MB':>7}   {'theirs s':>9} {'cpu s':>8} {'MB':>7}   cpu ratio")
    for name, (bits, ours, theirs) in CASES.items():
        if args.only not in name or (bits > 14 and not args.full):
            continue
        found = {"ours": measure_apart(ours, args.repeats)}
        line = "{seconds:9.4f} {cpu_seconds:8.4f} {peak_mb:7.0f}".format(**found["ours"])
        if theirs and not args.ours:
            found["theirs"] = measure_apart(theirs, 1 if bits > 14 else args.repeats)
            line += "   {seconds:9.4f} {cpu_seconds:8.4f} {peak_mb:7.0f}".format(**found["theirs"])
            line += f"   {found['theirs']['cpu_seconds'] / found['ours']['cpu_seconds']:7.1f}"
        results[name] = found
        print(f"{name:16} {line}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
