"""The table of methods: read off declarations, costs counted and stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vistok.cli import run
from vistok.compress.method import ScheduledMethod
from vistok.evaluate import bench_methods
from vistok.registry import register

SMALL = {"tower_depth": 3, "tower_width": 64, "depth": 4, "width": 64, "image": 56, "patch": 14}
STORED = Path(__file__).parents[2] / "assets" / "methods.json"


@pytest.fixture(scope="module")
def costs():
    return bench_methods.measure(SMALL, 0.25, ["random_features", "fastv", "tome", "snapkv"])


def test_a_selection_costs_what_its_tokens_cost(costs):
    """Closed form: per token 2(4 d^2 + 3 d m), attention 4 n^2 d; tower and projector in front are untouched."""
    assert costs["image_tokens"] == 16
    methods = costs["methods"]
    assert [methods[n]["left"] for n in ("random_features", "fastv", "tome", "snapkv")] == [4, 4, 4, 16]
    d, m, depth, vocabulary = 64, 8 * 64 // 3, 4, 1000

    def language(n: int) -> int:
        return depth * (2 * n * (4 * d * d + 3 * d * m) + 4 * n * n * d) + 2 * d * vocabulary

    patches, t = 17, 64
    block = 2 * patches * 12 * t * t + 4 * patches**2 * t
    tower = 3 * block + 2 * 16 * t * 3 * 14 * 14 + 2 * 16 * (t * d + d * d)
    whole = tower + language(76)
    assert methods["random_features"]["flops"] == pytest.approx((tower + language(64)) / whole, rel=1e-3)


def test_merging_in_the_tower_saves_more_than_selecting_behind_it_and_the_cache_saves_nothing_here(costs):
    share = {name: row["flops"] for name, row in costs["methods"].items()}
    assert share["tome"] < share["random_features"] < share["fastv"] < 1 < share["snapkv"]


def test_declarations_fill_the_table(costs):
    head, rows = bench_methods.table(costs)
    cells = {row[0]: dict(zip(head, row)) for row in rows}
    assert list(cells) == bench_methods.names()
    assert cells["tome"]["stages"] == "vision" and cells["tome"]["towers alone"] == "all"
    assert cells["fastv"]["attention"] == "language model" and cells["fastv"]["text"] == "yes"
    assert cells["random"]["attention"] == cells["random"]["text"] == "no"
    assert cells["cdpruner"]["text"] == "yes" and cells["fastervlm"]["attention"] == "tower"
    assert "internvl" in cells["globalcom2"]["hosts"] and cells["divprune"]["hosts"].startswith("all ")
    assert cells["mustdrop"]["stages"] == "vision, prefill, decode"
    assert cells["divprune"]["FLOPs>"] == "-"


@pytest.mark.usefixtures("scratch_registry")
def test_a_new_method_is_in_the_table_by_its_registration():
    @register("method", "aaa_mine")
    class Mine(ScheduledMethod):
        published_layers = (2,)
        published_ratios = (0.5,)
        trained = True

    row = dict(zip(*[(t := bench_methods.table())[0], next(r for r in t[1] if r[0] == "aaa_mine")]))
    assert (row["stages"], row["training"], row["towers alone"]) == ("prefill", "yes", "none")


def test_the_command_prints_stored_costs(capsys, tmp_path, costs):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs))
    assert run(["list", "method", "--costs", str(path), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| tome | vision | merges | keys of the tower | no | no |" in printed
    assert f"| {costs['methods']['tome']['flops']:.0%} | 4 |" in printed
    assert run(["list", "method", "--costs", str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"methods": 3}', '{"methods": {"tome": {"flops": "x"}}}'])
def test_a_file_without_costs_is_refused(tmp_path, capsys, text):
    (tmp_path / "costs.json").write_text(text)
    assert run(["list", "method", "--costs", str(tmp_path / "costs.json")]) == 2
    assert "holds no costs of methods" in capsys.readouterr().err


def test_a_share_that_keeps_nothing_is_refused(tmp_path, capsys):
    assert run(["bench", "methods", "--keep", "0", "--out", str(tmp_path / "costs.json")]) == 2
    assert "keep=0.0" in capsys.readouterr().err


def test_stored_costs_know_the_methods():
    stored = json.loads(STORED.read_text())
    assert stored["host"] == bench_methods.HOST and stored["image_tokens"] == 576
    assert not [name for name, row in stored["methods"].items() if not 0.1 < row["flops"] < 1.5]
