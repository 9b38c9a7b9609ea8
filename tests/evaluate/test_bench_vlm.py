"""The benchmark of compression methods: its figures belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vistok.cli.vlm import share
from vistok.evaluate.bench_vlm import VlmBench, random_inputs, random_llava, run, table


@pytest.fixture(scope="module")
def result() -> VlmBench:
    methods: list[Any] = ["random", {"name": "fastv", "layers": [1]}, "pool", "snapkv"]
    return run(methods=methods, keep=(0.25,), image_tokens=64, depth=3, width=64, rounds=1, decode=1)


def test_the_plain_model_leads_and_every_method_follows(result):
    assert [row["method"] for row in result.rows] == ["none", "random", "fastv", "pool", "snapkv"]
    assert [row["image_left"] for row in result.rows] == [64, 16, 16, 16, 64]
    assert (result.prompt, result.image_tokens) == (124, 64)


def test_efficiency_is_the_speed_up_over_what_the_flops_allow(result):
    plain = result.rows[0]
    for row in result.rows:
        assert row["allowed"] == pytest.approx(plain["flops"] / row["flops"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["allowed"])


def test_cache_bytes_follow_the_tokens(result):
    plain, *_, pool, snapkv = (row["cache_bytes"] for row in result.rows)
    assert plain == 3 * 2 * 64 * 4 * 124
    assert pool == 3 * 2 * 64 * 4 * 76
    assert snapkv == 2 * 64 * 4 * (124 + 2 * 76)


def test_pruning_lowers_the_peak(result):
    by_name = {row["method"]: row["peak_bytes"] for row in result.rows}
    assert by_name["pool"] < by_name["none"]


def test_the_table_has_a_line_per_row(result):
    assert len(table(result).splitlines()) == 1 + len(result.rows)


def test_a_model_comes_with_inputs():
    model = random_llava(image_tokens=16, depth=2, width=64)
    with pytest.raises(ValueError, match="Give `inputs`"):
        run(model)
    found = run(model, methods=["random"], keep=(4,), inputs=random_inputs(model), rounds=1, decode=0)
    assert found.rows[1]["image_left"] == 4


def test_the_process_clock_is_for_one_thread():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="threads=1"):
            run(clock="process")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("text", ["0", "0.0", "1.5", "-1", "nan", "x"])
def test_a_budget_of_nothing_is_refused_before_anything_runs(text):
    with pytest.raises(ValueError, match="shares in"):
        share(text)
