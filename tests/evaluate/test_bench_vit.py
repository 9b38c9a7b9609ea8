"""The benchmark of vision transformers: its figures belong together."""

from __future__ import annotations

import pytest

from tests.plugins import towers
from vistok.evaluate import bench_selections, bench_vit

SETTINGS = [{"name": "tome", "r": 5}, {"name": "cascade", "keep": 0.5}]


@pytest.fixture(scope="module")
def result() -> bench_vit.VitBench:
    return bench_vit.run([towers.vit(img_size=224, patch_size=28)], settings=SETTINGS, batch=1, rounds=1)


def test_the_plain_model_leads_and_every_method_follows(result):
    assert [(r["method"], r["settings"]) for r in result.rows] == [
        ("none", {}),
        ("tome", {"r": 5}),
        ("cascade", {"keep": 0.5}),
    ]
    assert [r["tokens"] for r in result.rows] == [65, 45, 33]
    assert [r["allowed"] > 1 for r in result.rows] == [False, True, True]


def test_flops_are_the_closed_form(result):
    n, d = 65, 32
    assert result.rows[0]["gmac"] == pytest.approx(4 * (4 * n * d * d + 2 * n * n * d + 8 * n * d * d) / 1e9)
    assert result.rows[0]["speedup"] == result.rows[0]["wall_speedup"] == 1


def test_the_table_has_a_line_per_row(result):
    assert len(bench_vit.table(result).splitlines()) == 1 + len(result.rows)


def test_a_setting_names_its_method():
    with pytest.raises(ValueError, match="names its method"):
        bench_vit.run([towers.vit()], settings=[{"r": 5}])


def test_a_model_that_timm_lacks_is_refused():
    with pytest.raises(ValueError, match="vit_tiny_patch16_22.*Did you mean.*'vit_tiny_patch16_224'"):
        bench_vit.run(["vit_tiny_patch16_22"], settings=SETTINGS, rounds=1)


def test_published_costs_of_vit_small():
    """The table of ToMe's card: 4.54 GMAC, 3.36 at r = 8, 2.64 at 13, 2.23 at 16; ours within its rounding."""
    import timm

    model = timm.create_model("vit_small_patch16_224").eval().requires_grad_(False)
    settings = [{"name": "tome", "r": r} for r in (8, 13, 16)] + [{"name": "tome", "r": (13, -1.0)}]
    found = [bench_vit._trace(model, towers.picture(1, 3, 224, 224), s).flops / 2e9 for s in [None, *settings]]
    assert [round(g, 2) for g in found] == [4.54, 3.36, 2.64, 2.23, 2.05]


def test_selections_are_timed_beside_the_tower():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    rows = bench_selections.run(["divprune", "fastervlm"], keep=0.25, rounds=1, width=64, blocks=2, tower=sizes)
    assert [r["method"] for r in rows] == ["divprune", "fastervlm"]
    for row in rows:
        assert row["share"] == pytest.approx(row["process_ms"] / row["tower_ms"])
        assert 20 <= row["left"] <= 30
    assert {"divprune", "fastervlm", "visionzip", "pool"} <= set(bench_selections.selections())
    assert not {"tome", "fastv", "downsample", "mustdrop"} & set(bench_selections.selections())
