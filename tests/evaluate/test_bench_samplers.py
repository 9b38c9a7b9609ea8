"""Samplers against network evaluations: equal budgets, equal noise, and a model that stays as it was."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import vistok
from vistok.cli.app import app
from vistok.evaluate import bench_samplers


def alive():
    tok = vistok.create("tokenizer", "flextok_tiny").eval()
    with torch.no_grad():
        for p in tok.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return tok


def test_samplers_are_compared_at_equal_budgets(photos, tmp_path):
    tok = alive()
    own = tok.sampling
    result = bench_samplers.run(tok, photos[:2], samplers=("euler", "heun", "rk4"), evaluations=(1, 2, 4), tokens=3)
    found = [(row["sampler"], row["steps"], row["evaluations"]) for row in result.rows]
    assert found == [("euler", 1, 1), ("euler", 2, 2), ("euler", 4, 4), ("heun", 1, 1), ("heun", 2, 3), ("rk4", 1, 3)]
    distance = {row["steps"]: row["distance"] for row in result.rows if row["sampler"] == "euler"}
    assert distance[4] < distance[1]
    assert tok.sampling == own and result.tokens == 3
    bench_samplers.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_command_writes_figures_and_plot(tmp_path):
    folder = alive().save_pretrained(tmp_path / "tok")
    command = ["bench", "samplers", str(folder), "--samplers", "euler", "--evaluations", "1,2"]
    outputs = ["--out", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    done = CliRunner().invoke(app, [*command, *outputs])
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "s.json").read_text())["rows"]) == 2 and (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
    ("name", "samplers", "message"),
    [
        ("titok_tiny", ("euler",), "does not decode with a flow"),
        ("flextok_tiny", ("eular",), "Did you mean 'euler'"),
        ("flextok_tiny", ("midpoint",), r"No step of midpoint fits into \[1\] network evaluations"),
    ],
)
def test_misuse_is_one_clear_line(photos, name, samplers, message):
    with pytest.raises(ValueError, match=message):
        bench_samplers.run(vistok.create("tokenizer", name).eval(), photos[:1], samplers=samplers, evaluations=[1])
