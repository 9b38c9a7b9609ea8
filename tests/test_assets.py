"""Where weights come from, and that nothing foreign is executed while they are read."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vistok import assets
from vistok.assets import Asset, AssetError, Inert, Source, UnreadableError


@pytest.fixture
def asset(monkeypatch, tmp_path) -> Asset:
    """A table with one asset, empty places, no network."""
    made = Asset(
        name="toy-net",
        summary="a toy",
        licence="none",
        sources=(Source(filename="toy.safetensors", url="https://example.invalid/toy.safetensors"),),
    )
    monkeypatch.setattr(assets, "ASSETS", {"toy-net": made})
    monkeypatch.setattr(assets, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("VISTOK_TOY_NET", raising=False)
    return made


def write(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.full((2,), value)}, path)
    return path


def test_places_are_searched_in_the_stated_order(asset, monkeypatch, tmp_path):
    cached = write(tmp_path / "torch" / "hub" / "checkpoints" / "toy.safetensors")
    assert assets.find("toy-net") == cached
    shipped = write(tmp_path / "shipped" / "toy.safetensors")
    assert assets.find("toy-net") == shipped
    named = write(tmp_path / "named.safetensors")
    monkeypatch.setenv("VISTOK_TOY_NET", str(named))
    assert assets.find("toy-net") == named
    given = write(tmp_path / "given.safetensors")
    assert assets.find("toy-net", given) == given


def test_carrier_package_is_found_by_its_file_list_without_import(asset, monkeypatch, tmp_path):
    folder = tmp_path / "site"
    write(folder / "carrier_pkg" / "toy.safetensors")
    (folder / "carrier_pkg" / "__init__.py").write_text("raise RuntimeError('imported')")
    info = folder / "carrier_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier-pkg\nVersion: 1.0\n")
    (info / "RECORD").write_text("carrier_pkg/__init__.py,,\ncarrier_pkg/toy.safetensors,,\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    source = Source(filename="toy.safetensors", carrier="carrier-pkg==1.0")
    assert assets.carried(source) == folder / "carrier_pkg" / "toy.safetensors"


def test_missing_weights_list_every_way_to_get_them(asset):
    with pytest.raises(AssetError, match=r"VISTOK_TOY_NET=.*example.invalid/toy.safetensors.*unset HF_HUB_OFFLINE"):
        assets.find("toy-net")


def test_unknown_asset_suggests_the_nearest():
    with pytest.raises(KeyError, match="lpips_alex"):
        assets.find("lpips_alx")


@pytest.mark.parametrize("by", ["path", "environment"])
def test_named_file_that_does_not_exist_is_an_error(asset, monkeypatch, tmp_path, by):
    missing = tmp_path / "nothing.pt"
    if by == "environment":
        monkeypatch.setenv("VISTOK_TOY_NET", str(missing))
    with pytest.raises(AssetError, match="no such file"):
        assets.find("toy-net", missing if by == "path" else None)


def test_damaged_file_is_refused(monkeypatch, tmp_path):
    source = Source(filename="toy.safetensors", sha256="00ff")
    monkeypatch.setattr(assets, "ASSETS", {"toy": Asset(name="toy", summary="", licence="", sources=(source,))})
    monkeypatch.setattr(assets, "SHIPPED", tmp_path)
    write(tmp_path / "toy.safetensors")
    with pytest.raises(AssetError, match="expected 00ff"):
        assets.find("toy")


@pytest.mark.parametrize("name", ["lpips_alex", "lpips_vgg_heads"])
def test_shipped_weights_have_their_stated_hash(name):
    path = assets.find(name)
    assert path.parent == assets.SHIPPED
    assert assets.sha256(path) == assets.ASSETS[name].sources[0].sha256


def test_second_asset_of_a_name_is_refused(asset):
    with pytest.raises(ValueError, match="exists already"):
        assets.add(Asset(name="toy-net", summary="another", licence=""))


class Foreign:
    """What a training framework leaves in a checkpoint."""

    def __init__(self, value: int) -> None:
        self.value = value


class ForeignDict(dict):
    """A dictionary with behaviour."""


class Exploit:
    """Writes a file when it is unpickled the usual way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_survive_and_globals_become_inert(tmp_path, zipped):
    weight = torch.arange(6.0).view(2, 3).t()
    content = {
        "state_dict": OrderedDict(a=weight, b=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))),
        "config": Foreign(3),
        "extra": ForeignDict(x=1),
        "function": torch.nn.functional.relu,
        "dtype": torch.float16,
        "step": 7,
    }
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    read = assets.unpickle(tmp_path / "x.ckpt")
    assert torch.equal(read["state_dict"]["a"], weight)
    assert torch.equal(read["state_dict"]["b"], torch.ones(2, dtype=torch.bfloat16))
    assert isinstance(read["config"], Inert) and not hasattr(read["config"], "value")
    assert "Foreign" in repr(read["config"])
    assert isinstance(read["extra"], Inert)
    assert issubclass(read["function"], Inert)
    assert (read["dtype"], read["step"]) == (torch.float16, 7)


@pytest.mark.parametrize("make", [torch.ones, lambda n: torch.nn.Parameter(torch.ones(n))], ids=["tensor", "parameter"])
def test_tensors_with_attributes_keep_their_values(tmp_path, make):
    weight = make(3)
    weight.note = Foreign(1)
    torch.save({"w": weight, "f8": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.pt")
    read = assets.read_tensors(tmp_path / "x.pt")
    assert torch.equal(read["w"], torch.ones(3)) and not hasattr(read["w"], "note")
    assert torch.equal(read["f8"].float(), torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, zipped):
    torch.save(
        {"w": torch.ones(1), "x": Exploit(tmp_path / "pwned")}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped
    )
    assert torch.equal(assets.read_tensors(tmp_path / "x.pt")["w"], torch.ones(1))
    assert not (tmp_path / "pwned").exists()


def test_nested_torch_load_is_not_executed(tmp_path):
    """A storage pickled on its own asks for a second, unrestricted torch.load."""
    torch.save({"s": torch.ones(2).untyped_storage()}, tmp_path / "x.pt")
    inner = pickle.dumps(Exploit(tmp_path / "pwned"))

    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner,)

    torch.save({"n": Nested()}, tmp_path / "y.pt")
    assert isinstance(assets.unpickle(tmp_path / "y.pt")["n"], Inert)
    assert not (tmp_path / "pwned").exists()


def test_numpy_pickle_is_read_with_exactly_its_three_globals(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": {"kernel": array}}, protocol=3))
    assert np.array_equal(assets.read(tmp_path / "x.ckpt")["a"]["kernel"], array)


def test_numpy_pickle_with_another_global_is_refused(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": np.zeros(2), "b": Exploit(tmp_path / "pwned")}))
    with pytest.raises(UnreadableError, match="not part of an array"):
        assets.read_numpy_pickle(tmp_path / "x.ckpt")
    assert not (tmp_path / "pwned").exists()


def test_torchscript_program_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/data.pkl", b"")
        file.writestr("x/constants.pkl", b"")
    with pytest.raises(UnreadableError, match="TorchScript"):
        assets.unpickle(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_damaged_weights_are_one_clear_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises(UnreadableError, match="cannot be read"):
        assets.read(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_and_cuts_are_one_clear_error_or_harmless(tmp_path, zipped, seed):
    torch.save({"state_dict": {"w": torch.ones(3)}}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    whole, draw = (tmp_path / "x.pt").read_bytes(), random.Random(seed)
    for _ in range(40):
        data = bytearray(whole[: draw.randrange(1, len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "bad.pt").write_bytes(data)
        with contextlib.suppress(UnreadableError):
            assets.read_tensors(tmp_path / "bad.pt")


def test_several_tables_need_a_key(tmp_path):
    torch.save({"net": {"w": torch.zeros(1)}, "ema": {"shadow": {"w": torch.ones(1)}}}, tmp_path / "x.pt")
    with pytest.raises(UnreadableError, match=r"net, ema\.shadow"):
        assets.read_tensors(tmp_path / "x.pt")
    assert assets.read_tensors(tmp_path / "x.pt", "ema.shadow")["w"] == 1


def test_state_dict_is_taken_among_several_tables(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}, tmp_path / "x.pt")
    assert assets.read_tensors(tmp_path / "x.pt")["w"] == 0
