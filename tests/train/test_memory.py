"""Compiled models and recomputed activations train as plain ones do."""

from __future__ import annotations

import pytest
import torch

from tests.train.test_processes import EXACT
from tests.train.tiny import recipe, weights
from vistok.config import ConfigError, merge
from vistok.train.loop import train


def test_recomputed_activations_give_the_same_weights(tmp_path):
    over = {"train": {"steps": 3, "save_every": 0, "log_every": 3}}
    train(recipe(tmp_path / "kept", over))
    train(recipe(tmp_path / "recomputed", {"train": {**over["train"], "gradient_checkpointing": True}}))
    kept, recomputed = (weights(tmp_path / name, 3) for name in ("kept", "recomputed"))
    assert all(torch.equal(recomputed[name], value) for name, value in kept.items())


def test_a_model_without_transformer_has_nothing_to_recompute(tmp_path):
    model = {"name": "maskgit_vqgan", "image_size": 32, "codebook_size": 16, "code_dim": 4, "channels": 32}
    over = {"train": {"gradient_checkpointing": True}}
    given = recipe(tmp_path, over)
    object.__setattr__(given, "model", model)
    with pytest.raises(ConfigError, match="gradient_checkpointing: MaskGITVQGAN has no transformer to recompute"):
        train(given)


@pytest.mark.slow
def test_a_compiled_model_trains_as_a_plain_one(tmp_path):
    over = merge(EXACT, {"train": {"steps": 3, "save_every": 0}})  # no draws: compiled code has a generator of its own
    train(recipe(tmp_path / "plain", over))
    train(recipe(tmp_path / "compiled", merge(over, {"train": {"compile": True}})))
    plain, compiled = (weights(tmp_path / name, 3) for name in ("plain", "compiled"))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-4)
