"""Compressors as things of their own: saved, loaded, official checkpoints recognised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.fill import fill
from vistok.cli import run
from vistok.config import create
from vistok.hub import LoadError

SIZES = {
    "quecc": {"dim": 16, "out_dim": 24, "levels": (1, 3), "grid": (4, 6), "window": 2, "text_dim": 8},
    "token_packer": {"dim": 16, "out_dim": 24, "levels": (1, 3), "grid": (4, 6), "window": 2},
}


def _noise(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _filled(keys, prefix):
    return {prefix + k: torch.from_numpy(fill(k, tuple(s))) for k, s in keys}


@pytest.mark.parametrize("name", SIZES)
def test_a_folder_gives_it_back(tmp_path, name):
    made = create("compressor", name, **SIZES[name]).eval()
    found = vistok.load(made.save_pretrained(tmp_path))
    x, levels = torch.randn(2, 24, 16), torch.randn(2, 24, 32)
    text = {"text": torch.randn(2, 8)} if made.text_dim else {}
    assert torch.equal(found(x, levels, **text), made(x, levels, **text))
    assert (found.num_tokens, found.levels, found.grid, found.renumber) == (6, (1, 3), (4, 6), True)
    assert found.model_id == made.model_id and not found.training
    with pytest.raises(LoadError, match="not a tokenizer"):
        vistok.load(tmp_path, kind="tokenizer")
    with pytest.raises(LoadError, match="no image_size"):
        vistok.load(tmp_path, image_size=(64, 64))


def test_the_command_converts_an_official_projector(golden, tmp_path, capsys):
    case = golden("quecc").meta["tokenpacker"]["g12s4"]
    save_file(_filled(case["state_dict"], "model.mm_projector."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"scale_factor": 4}')
    assert run(["convert", str(tmp_path), str(tmp_path / "ours")]) == 0
    found = vistok.load(tmp_path / "ours")
    assert f"token_packer {found.model_id}: 15.81 M parameters, 36 tokens per picture." in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.parametrize("name", ["g8k4", "g6k6_one_token", "g24k4"])
def test_the_official_quecc_projector_loads(golden, tmp_path, name):
    ref = golden("quecc")
    case = ref.meta["quecc"][name]
    dim = case["x_shape"][-1]
    mlp = [["1.weight", [48, dim]], ["1.bias", [48]], ["3.weight", [48, 48]], ["3.bias", [48]]]
    state = _filled(case["state_dict"], "model.mm_projector.0.") | _filled(mlp, "model.mm_projector.")
    torch.save(state | {"model.norm.weight": torch.ones(3)}, tmp_path / "mm_projector.bin")
    found = vistok.load(tmp_path / "mm_projector.bin")
    multi, text, x = (_noise(case[f"{k}_seed"], case[f"{k}_shape"]) for k in ("multi", "text", "x"))
    grid = (round(x.shape[1] ** 0.5),) * 2
    out = ref[f"quecc/{name}"]
    for i in (1, 3):
        out = out @ state[f"model.mm_projector.{i}.weight"].T + state[f"model.mm_projector.{i}.bias"]
        out = torch.nn.functional.gelu(out) if i == 1 else out
    torch.testing.assert_close(found(x, multi, grid, text[:, 0]), out, atol=1e-4, rtol=1e-4)
    assert found.registry_name == "quecc" and found.window == case["kernel"] and found.renumber


@pytest.mark.parity
@pytest.mark.parametrize("name", ["g8s2", "g12s4"])
def test_the_official_token_packer_projector_loads(golden, tmp_path, name):
    ref = golden("quecc")
    case = ref.meta["tokenpacker"][name]
    save_file(_filled(case["state_dict"], "model.mm_projector."), tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="do not tell the scale factor"):
        vistok.load(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(f'{{"scale_factor": {case["scale_factor"]}}}')
    found = vistok.load(tmp_path)
    x, multi = (_noise(case[f"{k}_seed"], case[f"{k}_shape"]) for k in ("x", "multi"))
    out = found(x, multi, (round(x.shape[1] ** 0.5),) * 2)
    torch.testing.assert_close(out, ref[f"tokenpacker/{name}"], atol=2e-5, rtol=2e-5)


def test_a_projector_with_something_missing_says_so(golden, tmp_path):
    case = golden("quecc").meta["quecc"]["g8k4"]
    state = _filled(case["state_dict"], "model.mm_projector.0.")
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(LoadError, match="looks like QueCC .* incomplete or altered"):
        vistok.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "changed", "match"),
    [
        ("quecc", {"window": 5}, r"grid of \(4, 6\) cannot be cut into windows of 5"),
        ("quecc", {"levels": ()}, "at least one hidden state"),
        ("token_packer", {"levels": (-2,)}, "numbered from 0 on"),
        ("quecc", {"skip": (-1, 0)}, "numbers of tokens, 0 or more"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(name, changed, match):
    with pytest.raises(ValueError, match=match):
        create("compressor", name, **{**SIZES[name], **changed})
