"""The benchmark of FlexTok's sampler: it compares equal outputs, and says what it measured."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from vistok.cli.app import app
from vistok.evaluate import bench_flow


def test_all_three_implementations_agree_on_a_small_model():
    threads = torch.get_num_threads()
    try:
        result = bench_flow.run("flextok_tiny", batch=3, tokens=(1, 5, 16), steps=3, rounds=1)
    finally:
        torch.set_num_threads(threads)
    assert [row["tokens"] for row in result.rows] == [1, 5, 16]
    assert all(0 < row["difference"] < 1e-4 for row in result.rows)
    assert all(row["plain_ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"]) for row in result.rows)
    assert len(bench_flow.table(result)) == 3


def test_a_difference_stops_the_benchmark(monkeypatch):
    def wrong(tok, codes, lengths, noise, sampler, guidance):
        return noise

    monkeypatch.setattr(bench_flow, "decode_packed", wrong)
    with pytest.raises(RuntimeError, match="implementations differ by"):
        bench_flow.run("flextok_tiny", batch=1, tokens=(2,), steps=1, rounds=1)


def test_command_prints_the_ratios(tmp_path):
    arguments = ["bench", "tokenizer", "flextok_tiny", "--batch", "1", "--rounds", "1", "--tokens", "2"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    assert "as packed" in done.output and "guidance 1.5" in done.output
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["tokens"] == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bench_flow.run("flextok_tiny", tokens=(17,)), r"--tokens are 1\.\.16"),
        (lambda: bench_flow.run("titok_tiny"), "takes FlexTok models"),
    ],
)
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_sampling_is_several_times_as_fast():
    """Width 512, guided, without the autoencoder; CPU time of the process on one thread."""
    result = bench_flow.run("flextok_d8_d8", batch=8, tokens=(32, 64), steps=1, rounds=2)
    small, large = result.rows
    assert small["plain_ratio"] >= 1.7 and large["plain_ratio"] >= 1.5
    assert small["packed_ratio"] >= 3 and large["packed_ratio"] >= 3
