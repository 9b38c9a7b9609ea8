"""Recomputed activations train as kept ones do."""

from __future__ import annotations

import pytest
import torch

from tests.train.tiny import recipe, weights
from vistok.config import ConfigError
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
