"""`vistok convert`: every official layout becomes ours, and nothing of it is executed."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
import yaml
from safetensors.torch import save_file

import vistok
from tests.fill import image
from tests.tokenizers.test_wetok import official_config, weights
from vistok.cli import run


class Trap:
    """What a hostile checkpoint would hold."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def wetok(golden, tmp_path, monkeypatch):
    """A WeTok folder as published (YAML and a Lightning checkpoint), with a trap in the checkpoint."""
    monkeypatch.chdir(tmp_path)
    ref = golden("wetok_small")
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "WeTok.yaml").write_text(yaml.safe_dump(official_config(ref.meta["cases"]["plain_rect"])))
    lightning = {"state_dict": weights(ref, "plain_rect"), "callbacks": Trap(), "hyper_parameters": {"a": Trap()}}
    torch.save(lightning, tmp_path / "official" / "WeTok.ckpt", pickle_module=pickle)
    return tmp_path / "official"


def test_a_folder_with_yaml_and_checkpoint_becomes_ours(wetok, tmp_path, capsys):
    assert run(["convert", str(wetok), "ours"]) == 0
    said = capsys.readouterr().out
    first, again = vistok.load(wetok), vistok.load("ours")
    assert f"wetok {again.model_id}" in said and "Wrote ours/model.safetensors" in said
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["format"] == "vistok"
    picture = image(1, 64)
    assert torch.equal(first.decode(first.encode(picture)), again.decode(again.encode(picture)))
    assert not (tmp_path / "executed").exists()


def test_a_single_file_takes_its_configuration_from_elsewhere(wetok, tmp_path, capsys):
    (wetok / "WeTok.yaml").rename(tmp_path / "elsewhere.yml")
    assert run(["convert", str(wetok / "WeTok.ckpt"), "ours", "--config", "elsewhere.yml"]) == 0
    assert vistok.load("ours").quantizer.groups == 3
    assert run(["convert", str(wetok / "WeTok.ckpt"), "ours"]) == 2
    assert "exist already. Give --overwrite" in capsys.readouterr().err
    assert run(["convert", str(wetok / "WeTok.ckpt"), "ours", "--overwrite"]) == 0


def test_a_hub_folder_becomes_ours(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ref = golden("titok_vae")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(ref.meta["config"]))
    save_file(ref.state_dict(), tmp_path / "hub" / "model.safetensors")
    assert run(["convert", "hub", "ours"]) == 0
    assert vistok.load("ours").model_id == vistok.load("hub").model_id


def test_of_a_training_checkpoint_the_averaged_weights_count(golden, tmp_path):
    state = weights(golden("wetok_small"), "plain_rect")
    averaged = {k: v + 1 for k, v in state.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}}
    torch.save({"model": state, "optimizer": optimizer, "ema": averaged, "steps": 1, "args": Trap()}, tmp_path / "a.pt")
    assert torch.equal(vistok.load(tmp_path / "a.pt").encoder.conv_in.weight, averaged["encoder.conv_in.weight"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weight file"),
        ({"a.pt": b"", "b.ckpt": b""}, r"several weight files \(a.pt, b.ckpt\). Give the one you mean"),
        ({"a.pt": b"junk"}, "cannot be read as a checkpoint"),
        ({"model.ckpt": None, "a.yaml": b"x: 1", "b.yaml": b"x: 1"}, r"several configurations \(a.yaml, b.yaml\)"),
        ({"model.ckpt": None, "a.yaml": b"[1, 2]"}, "holds no mapping at its top"),
        ({"model.ckpt": None, "a.yaml": b"x: !!python/object/apply:os.system ['touch executed']"}, "cannot be read as"),
        ({"model.ckpt": None, "config.py": b"def broken("}, "cannot be read as a configuration"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_clear_line(tmp_path, monkeypatch, capsys, files, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    for name, content in files.items():
        if content is None:
            torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "broken" / name)
        else:
            (tmp_path / "broken" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        vistok.load(tmp_path / "broken")
    assert run(["convert", "broken", "ours"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", vistok.list("tokenizer", "*", pretrained=True))
def test_every_published_model_states_its_licences(name):
    weights = vistok.info(name).weights
    assert weights.licence_code and weights.licence_weights and weights.trained_on


def test_info_prints_both_licences(capsys):
    assert run(["info", "instella_1024.laion"]) == 0
    said = capsys.readouterr().out
    assert "licence of the code" in said and "licence of the weights" in said and "no commercial use" in said
