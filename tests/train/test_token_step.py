"""A step that reads tokens trains on shards, and goes on after an interruption to the same weights."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vistok
from tests.tokenize.test_job import Colours, job
from tests.train import tiny
from vistok.config import ConfigError, merge
from vistok.hub import Saveable
from vistok.registry import register
from vistok.tokenize.views import Views
from vistok.train import checkpoint
from vistok.train.loop import train
from vistok.train.recipe import from_dict
from vistok.train.steps.base import Part, Step


class Next(Saveable, nn.Module):
    """The next id from the one before and the class."""

    def __init__(self, *, vocab: int = 256, classes: int = 3) -> None:
        super().__init__()
        self.ids, self.classes = nn.Embedding(vocab, vocab), nn.Embedding(classes, vocab)


class Predict(Step):
    model_kind = "generator"
    reads = "tokens"

    def run(self, batch, step, generator):
        model, ids = self.trained["model"], batch.tokens.ids
        logits = model.ids(ids[:, :-1]) + model.classes(batch.labels)[:, None]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        yield Part(name="model", loss=loss, terms={"nll": loss})


@pytest.fixture
def recipe(tmp_path, scratch_registry):
    register("generator", "next")(Next)
    register("step", "predict")(Predict)
    job(tmp_path / "ids", Colours(), views=Views(augment="flip"))

    def make(out, **over):
        train = {
            "steps": 6,
            "global_batch": 4,
            "log_every": 2,
            "save_every": 3,
            "trackers": [],
            "step": {"name": "predict"},
        }
        values = {
            "model": {"name": "next"},
            "data": {"name": "ids", "path": str(tmp_path / "ids")},
            "optim": {"name": "adamw", "lr": 1e-2, "warmup": 0},
            "train": {**train, "step": {"name": "predict"}, "out": str(tmp_path / out)},
        }
        return from_dict(merge(values, over))

    return make


def test_it_trains_on_tokens_and_goes_on_where_it_was(recipe, tmp_path):
    train(recipe("run"))
    straight = tiny.weights(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run" / checkpoint.FOLDER / "step_000000006")
    assert train(recipe("run")).resumed == 3
    again = tiny.weights(tmp_path / "run", 6)
    assert all(torch.equal(straight[key], again[key]) for key in straight)
    assert not torch.equal(tiny.weights(tmp_path / "run", 3)["ids.weight"], again["ids.weight"])
    data = vistok.create("dataset", "ids", path=str(tmp_path / "ids"))
    assert checkpoint.newest(tmp_path / "run").facts["data"] == data.fingerprint


def test_pictures_and_tokens_are_not_mixed_up(recipe, tmp_path):
    with pytest.raises(ConfigError, match="'predict' reads tokens, and 'photos' gives pictures: give name: ids"):
        train(dataclasses.replace(recipe("a"), data={"name": "photos"}))
    values = tiny.values(tmp_path / "b", {})
    values["data"] = {"name": "ids", "path": str(tmp_path / "ids")}
    with pytest.raises(ConfigError, match="'reconstruct' reads pictures, and 'ids' gives tokens"):
        train(from_dict(values))
