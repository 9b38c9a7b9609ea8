"""Checkpoints are whole or not there; damage is named; the previous one survives."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil

import pytest
import torch

from tests.train.tiny import recipe
from vistok.train import checkpoint
from vistok.train.checkpoint import CheckpointError, Snapshot
from vistok.train.loop import train


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step,
        modules={"model": {"w": torch.full((3,), float(step))}},
        optimizers={"model": {"state": {0: {"m": torch.ones(3) * step}}, "param_groups": [{"lr": 0.1, "params": [0]}]}},
        extra={"mean": torch.tensor(2.0)},
        facts={"seconds": 1.5},
        recipe={"train": {"steps": 9}},
    )


@pytest.fixture
def out(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    return tmp_path


def test_everything_comes_back(out):
    found = checkpoint.load(checkpoint.folders(out)[-1])
    assert found.step == 2 and found.facts == {"seconds": 1.5} and found.recipe == {"train": {"steps": 9}}
    assert torch.equal(found.modules["model"]["w"], torch.full((3,), 2.0))
    assert torch.equal(found.optimizers["model"]["state"][0]["m"], torch.ones(3) * 2)
    assert found.extra["mean"] == 2.0


def test_only_the_newest_are_kept(out):
    checkpoint.save(out, snapshot(3), keep=2)
    assert [f.name for f in checkpoint.folders(out)] == ["step_000000002", "step_000000003"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer_model.pt", "recipe.yaml", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_is_named_and_the_one_before_is_taken(out, file, damage):
    path = checkpoint.folders(out)[-1] / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.warns(UserWarning, match=rf"step_000000002.*{file}.*step_000000001 is taken"):
        assert checkpoint.newest(out).step == 1


def test_all_damaged_is_an_error(out):
    for folder in checkpoint.folders(out):
        (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="No checkpoint of"):
        checkpoint.newest(out)


def test_half_written_folder_is_ignored_and_removed_by_the_next_save(out):
    partial = out / checkpoint.FOLDER / ".step_000000003.partial"
    shutil.copytree(checkpoint.folders(out)[-1], partial)
    assert checkpoint.newest(out).step == 2
    checkpoint.save(out, snapshot(4), keep=2)
    assert not partial.exists()


@pytest.mark.parametrize("room", [0, 90, 400, 2000], ids=["weights", "extra", "optimizer", "state"])
def test_a_disk_that_fills_up_at_any_file_is_a_clear_error(out, room):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CheckpointError, match=r"^The checkpoint of step 3 .*File too large.*untouched\.$"):
            checkpoint.save(out, dataclasses.replace(snapshot(3), facts={"words": "long " * 500}), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted((out / checkpoint.FOLDER).iterdir()) == checkpoint.folders(out)
    assert checkpoint.newest(out).step == 2


def test_full_disk_is_a_clear_error_and_what_was_there_stays(out, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(CheckpointError, match=r"step 3 could not be written.*No space left.*untouched"):
        checkpoint.save(out, snapshot(3), keep=2)
    assert [f.name for f in sorted((out / checkpoint.FOLDER).iterdir())] == ["step_000000001", "step_000000002"]
    assert checkpoint.newest(out).step == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_really_full_device_is_a_clear_error(tmp_path, monkeypatch):
    def onto_full_device(folder, taken):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"weights")

    monkeypatch.setattr(checkpoint, "_write", onto_full_device)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tmp_path, snapshot(1), keep=2)


def test_pickled_code_is_never_run(out):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(out / "pwned"),))

    folder = checkpoint.folders(out)[-1]
    torch.save({"state": Evil()}, folder / "optimizer_model.pt")
    state = json.loads((folder / "state.json").read_text())
    state["files"]["optimizer_model.pt"] = checkpoint._facts_of(folder / "optimizer_model.pt")
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(folder)
    assert not (out / "pwned").exists()


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path):
    train(recipe(tmp_path))
    last = checkpoint.folders(tmp_path)[-1]
    (last / "ema.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="ema.safetensors is not what was written"):
        result = train(recipe(tmp_path))
    assert (result.resumed, result.step) == (3, 6)
