"""`train.compile: true` with the real compiler: it trains, saves plain names, and continues exactly."""

from __future__ import annotations

import shutil

import pytest
import torch

import vistok
from tests.train.tiny import recipe, weights
from vistok.config import merge
from vistok.train import checkpoint
from vistok.train.loop import train

pytestmark = pytest.mark.slow

FSQ = {"model": {"quantizer": {"name": "fsq", "levels": [4, 4, 4]}}}
GAN = {
    "name": "reconstruct_gan",
    "discriminator": {"name": "titok_discriminator", "width": 32, "stages": 2, "grid": 4},
    "gan": {"name": "hinge_gan"},
    "adaptive": True,
}
ADVERSARIAL = merge(FSQ, {"losses": {"adversarial": {"weight": 0.1, "start": 1}}, "train": {"step": GAN}})


@pytest.fixture(autouse=True)
def _compiler():
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("over", "tolerance"), [(FSQ, 1e-5), (ADVERSARIAL, 2e-3)], ids=["plain", "adversarial"])
def test_a_compiled_run_trains_saves_and_continues_like_any_other(tmp_path, over, tolerance):
    train(recipe(tmp_path / "plain", over))
    over = merge(over, {"train": {"compile": True}})
    train(recipe(tmp_path / "compiled", over))
    plain, compiled = weights(tmp_path / "plain", 6), weights(tmp_path / "compiled", 6)
    assert compiled.keys() == plain.keys()  # no `_orig_mod.`
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=0, atol=tolerance)

    shutil.rmtree(checkpoint.folders(tmp_path / "compiled")[-1])
    assert train(recipe(tmp_path / "compiled", over)).resumed == 3
    resumed = weights(tmp_path / "compiled", 6)
    assert all(torch.equal(resumed[key], value) for key, value in compiled.items())
    tokenizer = vistok.load(str(tmp_path / "compiled" / "tokenizer"))
    assert tokenizer.encode(torch.rand(1, 3, 32, 32)).ids.shape == (1, 8)
