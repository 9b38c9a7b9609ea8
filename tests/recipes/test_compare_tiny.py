"""The comparison of the small recipes: who takes part, what runs first, and that the stored results are one budget."""

from __future__ import annotations

import json

from recipes import compare_tiny


def test_every_small_colour_recipe_takes_part():
    known = compare_tiny.recipes()
    assert {"titok/tiny_single.yaml", "wetok/tiny.yaml", "instella/tiny.yaml"} <= set(compare_tiny.compared(known))
    assert "titok/tiny_stage1.yaml" not in compare_tiny.compared(known)  # learns codes, not pixels


def test_what_a_recipe_starts_from_runs_first():
    known = compare_tiny.recipes()
    chain = ["titok/tiny_proxy.yaml", "titok/tiny_stage1.yaml", "titok/tiny_stage2.yaml"]
    assert compare_tiny.chain("titok/tiny_stage2.yaml", known) == chain
    assert compare_tiny.chain("wetok/tiny_stage2.yaml", known) == ["wetok/tiny.yaml", "wetok/tiny_stage2.yaml"]


def test_stored_results_have_one_budget_and_a_recipe_each():
    results = compare_tiny.stored()
    assert {(row["steps"], row["batch"]) for row in results.values()} <= {(compare_tiny.STEPS, compare_tiny.BATCH)}
    assert set(results) <= set(compare_tiny.compared(compare_tiny.recipes()))


def test_the_table_has_a_line_per_result(tmp_path, monkeypatch):
    row = {
        "stages": 2,
        "side": 32,
        "tokens": 16,
        "bits": 0.0,
        "parameters": 1_230_000,
        "psnr": 20.0,
        "ssim": 0.5,
        "lpips_alex": 0.3,
        "usage": None,
        "pictures_per_core_second": 12.4,
    }
    monkeypatch.setattr(compare_tiny, "RESULTS", tmp_path / "results.json")
    assert compare_tiny.stored() == {}
    compare_tiny.RESULTS.write_text(json.dumps({"a/tiny.yaml": row, "b/tiny.yaml": {**row, "lpips_alex": 0.2}}))
    lines = compare_tiny.table(compare_tiny.stored()).splitlines()
    assert lines[2].startswith(
        "| [b/tiny](b/tiny.yaml), 2 runs | 32 | 16 | continuous | 1.23 | 20.00 | 0.500 | 0.200 |"
    )
    assert len(lines) == 4
