"""Saving, strict loading, the model id, atomic writing."""

from __future__ import annotations

import copy
import fnmatch
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vistok
from vistok import hub
from vistok.image import Preprocess
from vistok.registry import register


class Keeper(hub.Saveable, nn.Module):
    """A module that can be saved."""

    def __init__(self, *, width: int, sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.register_buffer("count", torch.tensor(0))


class WideKeeper(Keeper):
    """Its subclass, with another signature."""

    def __init__(self, *, factor: int = 2) -> None:
        super().__init__(width=4 * factor)


class Unsaved(nn.Module):
    """A registered module that is not kept in folders."""

    def __init__(self) -> None:
        super().__init__()


@pytest.fixture
def keeper(scratch_registry: None) -> Keeper:
    register("generator", "test_keeper")(Keeper)
    register("generator", "test_wide_keeper")(WideKeeper)
    register("generator", "test_unsaved")(Unsaved)
    return vistok.create("generator", "test_keeper", width=3)


def test_config_holds_all_arguments_with_their_defaults(keeper: Keeper) -> None:
    assert keeper.config == {"width": 3, "sizes": [1, 2]}


@pytest.mark.usefixtures("keeper")
def test_config_is_that_of_the_class_that_was_built_not_of_its_base() -> None:
    assert WideKeeper(factor=3).config == {"factor": 3}


def test_a_saved_module_is_loaded_bit_for_bit(keeper: Keeper, tmp_path: Path) -> None:
    keeper.save_pretrained(tmp_path / "folder")
    found = Keeper.from_pretrained(tmp_path / "folder")
    assert found.config == keeper.config
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), keeper.state_dict().values()))


def test_saving_twice_leaves_two_files(keeper: Keeper, tmp_path: Path) -> None:
    keeper.save_pretrained(tmp_path)
    keeper.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_files_load_into_float32(keeper: Keeper, tmp_path: Path) -> None:
    keeper.half().save_pretrained(tmp_path)
    found = Keeper.from_pretrained(tmp_path)
    assert found.layer.weight.dtype == torch.float32
    assert torch.equal(found.layer.weight, keeper.layer.weight.float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"missing 3 \(count, layer.bias, layer.weight\)\."),
        ({"extra": torch.zeros(1)}, r"missing 3 .*; not known 1 \(extra\)\."),
        (
            {"layer.weight": torch.zeros(2, 3), "layer.bias": torch.zeros(3), "count": torch.tensor(0)},
            r"wrong shape 1 \(layer.weight \(2, 3\) for \(3, 3\)\)\.",
        ),
    ],
)
def test_what_does_not_fit_is_listed(keeper: Keeper, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(hub.LoadError, match="^here does not fit Keeper: " + message):
        hub.load_strictly(keeper, tensors, "here")


def broken(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not in vistok's format. Use vistok.load"),
        ({"kind": None}, "does not describe a vistok module: it needs kind, name and config"),
        ({"config": [3]}, "does not describe a vistok module"),
        (
            {"name": "test_keper"},
            "does not fit this vistok: No generator named 'test_keper'. Did you mean 'test_keeper'",
        ),
        ({"config": {"width": 3, "depth": 1}}, "does not fit this vistok: depth: .* no such key"),
        ({"config": {"width": 4}}, "does not fit Keeper: wrong shape 2"),
        ({"name": "test_unsaved", "config": {}}, "names the generator .test_unsaved., which is not kept in folders"),
        ({"name": "test_wide_keeper", "config": {}}, "wrong shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_said(
    keeper: Keeper, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = broken(keeper.save_pretrained(tmp_path), **changes)
    with pytest.raises(hub.LoadError, match=message):
        Keeper.from_pretrained(folder)


def test_a_folder_of_another_class_is_refused(keeper: Keeper, tmp_path: Path) -> None:
    with pytest.raises(hub.LoadError, match="holds 'test_keeper', a Keeper, not a WideKeeper"):
        WideKeeper.from_pretrained(keeper.save_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json is not valid JSON"),
        ("config.json", b"[1]", "does not hold a JSON object"),
        ("config.json", b"\xff\xfe", "is not valid JSON"),
        ("config.json", None, "has no config.json. A checkpoint folder holds config.json and model.safetensors"),
        ("model.safetensors", None, "has no safetensors file"),
        ("model.safetensors", b"nothing", "is damaged or not a safetensors file"),
        ("model.safetensors", b"", "is damaged or not a safetensors file"),
    ],
)
def test_a_damaged_folder_is_said(
    keeper: Keeper, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    keeper.save_pretrained(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(hub.LoadError, match=message):
        Keeper.from_pretrained(tmp_path)


def test_truncated_weights_are_said(keeper: Keeper, tmp_path: Path) -> None:
    path = keeper.save_pretrained(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(hub.LoadError, match="is damaged"):
        Keeper.from_pretrained(tmp_path)


def test_a_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(hub.LoadError, match="Did you mean 'checkpoint'. For the hub write hf-hub:org/name"):
        hub.locate(tmp_path / "checkpont")


@pytest.mark.parametrize("repo", ["org/name-that-is-nowhere", "not a repository//id"])
def test_a_hub_repository_that_cannot_be_reached_is_said(repo: str) -> None:
    with pytest.raises(hub.LoadError, match="could not be fetched from the hub and is not in its cache"):
        hub.locate(hub.HUB_PREFIX + repo)


# -- the model id --------------------------------------------------------------------------------------------------


def test_the_model_id_is_the_documented_hash() -> None:
    import hashlib

    import numpy as np

    tensors = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3)}
    expected = hashlib.sha256(
        b"a()" + np.int64(3).tobytes() + b"b(2,)" + np.array([1, 2], dtype="<f4").tobytes()
    ).hexdigest()[:8]
    assert hub.model_id(tensors) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_id_depends_on_values_not_on_precision_or_layout(dtype: torch.dtype) -> None:
    value = torch.tensor([[1.0, 0.5], [0.25, -2.0]])
    stored = {"w": value.T.contiguous().T.to(dtype)}
    assert hub.model_id(stored) == hub.model_id({"w": value})


@pytest.fixture
def tokenizer() -> Any:
    return vistok.create("tokenizer", "titok_tiny").eval()


def test_the_model_id_ignores_the_decoder(tokenizer: Any) -> None:
    before = tokenizer.model_id
    state = {k: v + 1 if k.startswith(tokenizer.decoder_parts) else v for k, v in tokenizer.state_dict().items()}
    tokenizer.load_state_dict(state)
    assert tokenizer.model_id == before


def test_the_model_id_follows_the_encoder(tokenizer: Any) -> None:
    before = tokenizer.model_id
    tokenizer.load_state_dict({k: v + 1 for k, v in tokenizer.state_dict().items()})
    assert tokenizer.model_id != before


def test_training_forgets_the_model_id(tokenizer: Any) -> None:
    before = tokenizer.model_id
    tokenizer.train()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(1)
    assert tokenizer.eval().model_id != before


def test_a_half_precision_copy_keeps_the_model_id(tokenizer: Any, tmp_path: Path) -> None:
    before = tokenizer.model_id
    tokenizer.half().save_pretrained(tmp_path)
    assert vistok.load(tmp_path).model_id == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_the_weights_keeps_the_model_id(tokenizer: Any, dtype: torch.dtype) -> None:
    rounded = copy.deepcopy(tokenizer).to(dtype)  # before anybody asked for the id
    assert rounded.model_id == tokenizer.model_id


def test_the_model_id_follows_weights_that_change_in_training(tokenizer: Any) -> None:
    before = tokenizer.train().model_id
    with torch.no_grad():
        tokenizer.encoder.head.weight.add_(1)
    assert tokenizer.model_id != before


def test_preprocessing_of_another_size_than_the_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    folder = broken(tokenizer.save_pretrained(tmp_path), preprocess={"size": [32, 32]})
    with pytest.raises(hub.LoadError, match=r"gives pictures of \(32, 32\) .* is for \(64, 64\)"):
        vistok.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"width": 64, "depth": 2, "heads": 0}}, "cannot be split into 0 heads"),
        ({"encoder": {"width": -64, "depth": 2, "heads": 2}}, "negative dimension"),
        ({"patch_size": 0}, "not a multiple of the patch size 0"),
        ({"num_tokens": 10**13}, "does not fit this vistok"),
    ],
)
def test_sizes_that_cannot_be_built_are_said(
    tokenizer: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = broken(tokenizer.save_pretrained(tmp_path), config={**tokenizer.config, **changes})
    with pytest.raises(hub.LoadError, match=message):
        vistok.load(folder)


def test_a_model_loaded_in_half_precision_keeps_the_model_id(tokenizer: Any, tmp_path: Path) -> None:
    folder = tokenizer.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["model_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert vistok.load(folder, dtype=torch.bfloat16).model_id == tokenizer.model_id


def test_preprocessing_travels_with_the_weights(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.preprocess = Preprocess(size=tokenizer.preprocess.size, crop="squash", resample="lanczos")
    found = vistok.load(tokenizer.save_pretrained(tmp_path))
    assert found.preprocess == tokenizer.preprocess


# -- files ---------------------------------------------------------------------------------------------------------


def test_an_atomic_write_replaces_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    hub.write_atomic(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        hub.write_atomic(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


@pytest.mark.parametrize(("held", "calls"), [("model.safetensors", 1), ("tokenizer.ckpt", 2)])
def test_other_weights_are_fetched_only_where_there_are_no_safetensors(tmp_path, monkeypatch, held, calls):
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append(allow_patterns)
        if any(fnmatch.fnmatch(held, pattern) for pattern in allow_patterns):
            (tmp_path / held).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub.locate("hf-hub:org/name") == tmp_path
    assert (tmp_path / held).is_file()
    assert len(asked) == calls
