"""The quantizer benchmarks run, and keep what they promise."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json

import pytest
from rich.console import Console

from tests.bench import quantizers as cost
from vistok.cli.runs import bench_quantizers as cli_bench_quantizers
from vistok.evaluate import bench_quantizers
from vistok.evaluate.step_cost import measure_step


@pytest.fixture(scope="module")
def short():
    return bench_quantizers.run(kinds=["fsq", "bsq", "gaussian"], steps=4, batch=2)


def test_result_is_plain_json(short):
    plain = json.loads(json.dumps(short.as_dict()))
    assert [row["label"] for row in plain["rows"]] == ["fsq 8 5 5 5", "bsq", "gaussian"]
    assert plain["steps"] == 4


def test_every_entry_has_ten_bits_or_none():
    for entry in bench_quantizers.ENTRIES:
        q = bench_quantizers.create("quantizer", **entry.spec)
        bits = q.bits * q.num_ids(16) / 16 if q.vocab_sizes else 10
        assert abs(bits - 10) < 0.1, entry.label


def test_table_and_plot_show_every_row(short, tmp_path):
    assert bench_quantizers.make_table(short).row_count == 3
    bench_quantizers.plot(short, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_table_is_readable_at_80_columns(short):
    console = Console(width=80, file=io.StringIO())
    slow = dataclasses.replace(short.rows[0], label="residual ema vq 2 x 32", seconds=999.0, step_ms=999.0)
    console.print(bench_quantizers.make_table(dataclasses.replace(short, rows=(*short.rows, slow))))
    said = console.file.getvalue()
    assert "residual ema vq 2 x 32 *" in said
    assert "…" not in said


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="No quantizer \\['vqq'\\] in this benchmark"):
        bench_quantizers.run(kinds=["vqq"])


def test_step_cost_counts_what_is_alive():
    _, small = measure_step(bench_quantizers.create("quantizer", "fsq", levels=[8, 8]), repeats=1)
    _, large = measure_step(bench_quantizers.create("quantizer", "lfq", dim=16), repeats=1)
    assert small < 0.5
    assert large > 2


@pytest.mark.slow
def test_recommended_quantizers_end_with_their_ids_in_use():
    kinds = [e.label for e in bench_quantizers.ENTRIES if e.recommended]
    result = bench_quantizers.run(kinds=kinds)
    assert {row.label: row.usage for row in result.rows if row.usage < 0.9} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "faster", "smaller"), [("lfq 2^14", 30, 5), ("ema vq 2^14", 3, 5)])
def test_cost_beside_vector_quantize_pytorch(case, faster, smaller):
    pytest.importorskip("vector_quantize_pytorch")
    _, ours, theirs = cost.CASES[case]
    found, other = cost.measure_apart(ours, 3), cost.measure_apart(theirs, 1)
    assert other["cpu_seconds"] > faster * found["cpu_seconds"]
    assert other["peak_mb"] > smaller * found["peak_mb"]


def test_the_command_runs_what_the_function_runs():
    ours = inspect.signature(bench_quantizers.run).parameters
    command = inspect.signature(cli_bench_quantizers).parameters
    assert all(command[name].default == ours[name].default for name in ("steps", "batch", "seed"))
