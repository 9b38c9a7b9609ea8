"""Training a compressor on a frozen host: it learns, the host stands still, two processes equal one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import vistok
from tests.plugins import local
from tests.train import tiny
from tests.train.test_processes import finish, launch
from tests.train.test_vlm_step import batch as batch
from tests.train.test_vlm_step import folder as folder
from tests.train.test_vlm_step import values as vlm_values
from vistok.config import ConfigError, create, merge, write_yaml
from vistok.data.base import Batch
from vistok.plugins.hosts.local import read
from vistok.train.loop import train
from vistok.train.recipe import from_dict
from vistok.train.steps.base import Losses, LossSpec, Weighting
from vistok.train.steps.compressor import TrainCompressor

SIZES: dict[str, Any] = {"dim": 32, "out_dim": 32, "levels": [1, 2], "grid": [4, 4], "window": 2, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {"quecc": {**SIZES, "text_dim": 32}, "token_packer": SIZES}


def values(folder: Path, out: Path, name: str = "quecc", over: dict[str, Any] | None = None) -> dict[str, Any]:
    base = vlm_values(folder, out, {"data": {"image_size": local.SIZE}})
    base["model"] = {"name": name, **MODELS[name]}
    base["train"]["step"] = {"name": "compressor", "host": str(folder)}
    return merge(base, over or {})


def step_of(folder: Path, name: str = "quecc", answers: float = 1.0, pooled: float = 0.0, **config: Any) -> Any:
    torch.manual_seed(0)
    weights = {"answers": answers, "pooled": pooled}
    specs = {n: LossSpec(Weighting(weight=w), None) for n, w in weights.items() if w}
    step = TrainCompressor(host=str(folder), **config)
    step.setup(create("compressor", name, **MODELS[name]), Losses(specs))
    return step


def part_of(step: Any, batch: Batch) -> Any:
    (part,) = step.run(batch, 0, torch.Generator())
    return part


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls_and_the_host_stands_still(folder, batch, name):
    step = step_of(folder, name)
    before = copy.deepcopy(step.host.state_dict())
    optimizer = torch.optim.AdamW(step.trained["model"].parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        part = part_of(step, batch)
        part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(part.loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(value, before[key]) for key, value in step.host.state_dict().items())
    assert all(p.grad is None for p in step.host.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_all_logits_whatever_side_is_padded(folder, batch, side):
    step = step_of(folder, "token_packer")
    step.processor.tokenizer.padding_side = side
    inputs, labels = step.inputs(batch)
    with torch.no_grad():
        part = part_of(step, batch)
        out = step.host(**inputs, labels=labels, use_cache=False)
        short = step.plugin.prepare({**inputs, "labels": labels})["labels"]
    torch.testing.assert_close(part.loss, out.loss, atol=1e-6, rtol=1e-6)
    asked = short[:, 1:] != -100
    right = (out.logits[:, :-1].argmax(-1) == short[:, 1:]) & asked
    assert asked.sum() == (labels != -100).sum()
    torch.testing.assert_close(part.stats["answers/accuracy"], right.sum() / asked.sum())


def test_pooled_alone_runs_no_answers_and_compares_with_means_of_the_hosts_tokens(folder, batch):
    step = step_of(folder, "token_packer", answers=0.0, pooled=1.0)
    part = part_of(step, batch)
    assert set(part.terms) == {"pooled"} and not part.stats
    inputs, _ = step.inputs(batch)
    full = step.host.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    cells = torch.stack(list(full)).view(3, 2, 2, 2, 2, -1).mean((2, 4)).flatten(1, 2)
    with torch.no_grad():
        tokens = torch.stack(list(step.plugin.prepare(inputs)["mm_encoder_outputs"]["image"].pooler_output))
    expected = (tokens - cells).square().mean() / cells.square().mean()
    torch.testing.assert_close(part.loss.detach(), expected, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(folder, batch):
    found = []
    for checkpointed in (False, True):
        step = step_of(folder, gradient_checkpointing=checkpointed)
        loss = part_of(step, batch).loss
        loss.backward()
        found.append((loss.detach(), [p.grad for p in step.trained["model"].parameters()]))
    layers = step.plugin.runtime.text.layers
    assert all(layer.gradient_checkpointing and layer.training and not layer.mlp.training for layer in layers)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_a_run_leaves_a_compressor_that_fits_the_host(folder, tmp_path, batch):
    over = {"losses": {"pooled": 0.5, "answers": {"weight": 1.0, "start": 2}}}
    result = train(from_dict(values(folder, tmp_path, over=over)))
    assert result.files[tmp_path / "compressor"] == "the trained model; vistok.load reads it"
    found = vistok.load(tmp_path / "compressor")
    model, _ = read(folder, "float32", "host")
    inputs, _ = step_of(folder).inputs(batch)
    with vistok.attach(model, "quecc", compressor=str(tmp_path / "compressor")) as plugin:
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 3 and plugin.trace.image[0] == [4] * 3
    again = values(folder, tmp_path / "again", over={"train": {"init_from": str(tmp_path / "compressor"), "steps": 1}})
    train(from_dict(merge(again, {"optim": {"lr": 0.0, "warmup": 0}})))
    assert vistok.load(tmp_path / "again" / "compressor").model_id == found.model_id


@pytest.mark.parametrize(
    ("over", "error", "match"),
    [
        ({"model": {"out_dim": 16}}, ValueError, "language model width 16, the host's is 32"),
        ({"losses": {"mse": 1.0}}, ValueError, "'compressor' makes no pictures"),
        ({"train": {"step": {"host": "/nowhere"}}}, FileNotFoundError, r"train\.step\.host: /nowhere holds no model"),
        ({"data": {"image_size": None}}, ConfigError, "no picture size of its own. Give the host's"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, over, error, match):
    with pytest.raises(error, match=match):
        train(from_dict(values(folder, tmp_path, over=over)))


def test_a_recipe_without_losses_trains_nothing(folder):
    with pytest.raises(ValueError, match="needs losses: answers, pooled"):
        step_of(folder, answers=0.0)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    over = {"losses": {"answers": 1.0, "pooled": 0.5}, "train": {"save_every": 4}}
    recipe = tmp_path / "given.yaml"
    write_yaml(values(folder, tmp_path / "two", over=over), recipe)
    finish(launch(recipe, world=2), timeout=400)
    train(from_dict(values(folder, tmp_path / "one", over=merge(over, {"train": {"batch": 2}}))))
    ours, theirs = tiny.weights(tmp_path / "two", 4), tiny.weights(tmp_path / "one", 4)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)
