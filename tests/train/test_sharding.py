"""FSDP by Accelerate's configuration, two processes over gloo: the same training, in parts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vistok
from tests.train import tiny
from tests.train.test_processes import EXACT, GAN, LOSSES, finish, launch, written
from vistok.config import ConfigError, merge
from vistok.train import checkpoint, log
from vistok.train.build import _refuse_unsharded
from vistok.train.loop import train
from vistok.train.sharding import switch_on

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
}
HELD_OUT = {"eval": {"data": {"name": "photos", "split": "heldout"}, "metrics": ["psnr"]}}
SHORT = merge(EXACT, {"train": {"steps": 8, "save_every": 4, "log_every": 1}, **HELD_OUT})
ADVERSARIAL = {
    "losses": {**LOSSES, "adversarial": {"weight": 0.1, "start": 3}},
    "train": {"step": {**GAN, "adaptive": False}},
    "optim": {"lr": 1e-4},
}


class Lone:
    """An accelerator of several processes, as far as `switch_on` looks."""

    def __init__(self, processes: int) -> None:
        self.num_processes = processes
        self.state = self


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP 1; vistok shards with FSDP 2. Add --fsdp_version 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "Leave it off there and set train.gradient_checkpointing=true"),
    ],
)
def test_settings_that_do_not_fit_are_refused(monkeypatch, settings, message):
    for key, value in {**SHARDED, **settings}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=message):
        switch_on(Lone(2))


def test_one_process_and_no_wish_stay_whole(monkeypatch):
    assert not switch_on(Lone(2))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not switch_on(Lone(1))


def test_what_needs_whole_weights_outside_the_forward_pass_is_refused(tmp_path):
    over = merge({"train": {"step": GAN, "compile": True}, "losses": LOSSES}, {"optim": {"name": "muon"}})
    given = tiny.recipe(tmp_path, over)
    _refuse_unsharded(given, False)
    with pytest.raises(
        ConfigError, match="train.compile, train.step.adaptive, optim.name=muon: not together with FSDP"
    ):
        _refuse_unsharded(given, True)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "names"), [({}, ("model", "ema")), (ADVERSARIAL, ("model", "ema", "discriminator"))], ids=["plain", "gan"]
)
def test_two_shards_train_as_one_process_and_resume_exactly(tmp_path, monkeypatch, more, names):
    over = merge(SHORT, more)
    with monkeypatch.context() as environment:
        for key, value in SHARDED.items():
            environment.setenv(key, value)
        said = finish(launch(written(tmp_path / "two", over), world=2), timeout=240)
        assert "on 2 x cpu, sharded" in said[0]
        straight = checkpoint.load(checkpoint.folders(tmp_path / "two")[-1])
        shutil.rmtree(checkpoint.folders(tmp_path / "two")[-1])
        finish(launch(tmp_path / "two" / "given.yaml", world=2), timeout=240)
    resumed = checkpoint.load(checkpoint.folders(tmp_path / "two")[-1])
    for name in names:
        assert all(torch.equal(v, straight.modules[name][k]) for k, v in resumed.modules[name].items())

    alone = train(tiny.recipe(tmp_path / "one", over))
    for name in names:  # whole tensors, under the same names, in a checkpoint that says nothing of shards
        one, two = (tiny.weights(tmp_path / n, 8, name) for n in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4)
    losses = [[row["loss"] for row in log.read(tmp_path / n / log.METRICS) if "loss" in row] for n in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    tokenizer = vistok.load(str(tmp_path / "two" / "tokenizer"))
    assert all(torch.equal(p, resumed.modules["ema"][n]) for n, p in tokenizer.named_parameters())
    found = json.loads((tmp_path / "two" / "eval" / "metrics.json").read_text())
    assert found["figures"]["psnr"] == pytest.approx(alone.figures["psnr"], abs=1e-3)
    assert found["protocol"]["settings"]["processes"] == 2


@pytest.mark.dist
@pytest.mark.slow
def test_a_sharded_run_goes_on_without_shards_and_the_documented_command_shards(tmp_path):
    file = written(tmp_path / "run", merge(SHORT, {"train": {"steps": 4}, "eval": {"data": None}}))
    options = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]
    wrap = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "Block"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *wrap, "-m", "vistok", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert "4 steps of 4 on 2 x cpu, sharded" in done.stdout, done.stderr
    result = train(tiny.recipe(tmp_path / "run", merge(SHORT, {"train": {"resume": "anyway"}, "eval": {"data": None}})))
    assert (result.resumed, result.step) == (4, 8)
