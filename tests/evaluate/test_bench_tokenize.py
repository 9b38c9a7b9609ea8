"""`vistok bench tokenize`: its figures belong together."""

from __future__ import annotations

import json

import pytest

from tests.test_cli import ran
from vistok.evaluate import bench_tokenize


def test_speeds_and_ratios_belong_together(photos, tmp_path):
    data = {"name": "folder", "path": [str(p) for p in photos[:3]]}
    result = bench_tokenize.run("titok_tiny", data=data, batch=4, rounds=1, threads=1)
    assert result.pictures == 6
    assert result.ratio == pytest.approx(result.pipeline / result.encoder)
    assert 0 < result.ratio < 1.5 and 0 < result.cpu_ratio < 1.5 and 0 <= result.waited < 1


def test_the_command_prints_and_writes_them(capsys, tmp_path):
    words = ["bench", "tokenize", "--model", "titok_tiny", "--rounds", 1, "--threads", 1]
    said = ran(capsys, *words, "--out", tmp_path / "b.json")
    assert "of the encoder's speed" in said and "16 pictures" in said
    assert json.loads((tmp_path / "b.json").read_text())["model"] == "titok_tiny"
