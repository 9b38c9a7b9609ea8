"""The flow's training step: what it minimises, what keys its draws, and the alignment with DINOv2."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import vistok
from tests.train.tiny import recipe, weights
from vistok.config import create
from vistok.data.base import Batch
from vistok.losses.repa import Repa
from vistok.train import checkpoint
from vistok.train.loop import train
from vistok.train.recipe import from_dict
from vistok.train.steps.base import Losses, LossSpec, Weighting

SIZE = {"width": 32, "depth": 2, "heads": 1}
MODEL = {
    "name": "flextok",
    "image_size": 32,
    "patch_size": 8,
    "num_tokens": 8,
    "encoder": SIZE,
    "decoder": SIZE,
    "quantizer": {"name": "fsq", "levels": [8, 5, 5]},
    "start": "local",
    "sampling": {"steps": 2, "guidance": 1.0},
}


def values(out, **over):
    found = recipe(out, {"train": over}).resolved()
    return found | {
        "model": MODEL,
        "losses": {"flow": {"weight": 1.0}},
        "train": found["train"] | {"step": {"name": "flow"}},
    }


def built(model=None, losses=None, **settings):
    model = vistok.create("tokenizer", **(MODEL | (model or {})))
    step = create("step", name="flow", **settings)
    step.setup(model, Losses(losses or {}))
    return model, step


def part_of(step, batch):
    return next(step.run(batch, 3, torch.Generator().manual_seed(0)))


def batch(size=4, first=0):
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Batch(images=images[first : first + size], positions=torch.arange(first, first + size), seed=5)


def test_it_learns_and_leaves_a_model_that_decodes(tmp_path):
    found = values(tmp_path, steps=40, global_batch=8)
    found["optim"] |= {"lr": 3e-3}
    result = train(from_dict(found))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/flow"] for row in rows if "loss/flow" in row]
    assert losses[-1] < 0.9 * losses[0]
    tok = vistok.load(result.out / "tokenizer")
    assert tok.decode(tok.encode(batch().images)[:, :3]).shape == (4, 3, 32, 32)


def test_a_killed_run_continues_bit_identically(tmp_path):
    for name in ("whole", "resumed"):
        train(from_dict(values(tmp_path / name, steps=6, save_every=3)))
    last = checkpoint.folders(tmp_path / "resumed")[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    train(from_dict(values(tmp_path / "resumed", steps=6, save_every=3)))
    a, b = weights(tmp_path / "whole", 6), weights(tmp_path / "resumed", 6)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_halves_of_a_batch_equal_the_whole():
    model, step = built()
    whole = part_of(step, batch(8))
    model.zero_grad()
    whole.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    halves = [part_of(step, batch(4, first)) for first in (0, 4)]
    (sum(half.loss for half in halves) / 2).backward()
    torch.testing.assert_close(sum(half.loss for half in halves) / 2, whole.loss)
    for p, before in zip((p for p in model.parameters() if p.grad is not None), gradients):
        torch.testing.assert_close(p.grad, before, rtol=1e-3, atol=1e-6)


def test_the_loss_of_a_silent_model_is_that_of_the_noise():
    _, step = built({"start": "published"})
    given = batch(8)
    noise = given.normal("flow_noise", (3, 32, 32))
    expected = (noise - (2 * given.images - 1)).square().mean()
    torch.testing.assert_close(part_of(step, given).terms["flow"], expected)


class Teacher(nn.Module):
    width = 6

    def forward(self, features, images):
        return features.square().flatten(1).mean(1)


def test_alignment_counts_with_its_weight(monkeypatch):
    model = vistok.create("tokenizer", **MODEL, repa_dim=6)
    step = create("step", name="flow", repa={"name": "repa"})
    monkeypatch.setattr("vistok.train.steps.flow.create", lambda kind, **spec: Teacher())
    step.setup(model, Losses({"repa": LossSpec(Weighting(weight=0.5), None)}))
    part = part_of(step, batch())
    torch.testing.assert_close(part.loss, part.terms["flow"] + 0.5 * part.terms["repa"] + part.terms["quantizer"])
    part.loss.backward()
    assert all(p.grad is not None for p in model.repa.parameters())
    model.repa_dim = 7
    with pytest.raises(ValueError, match="teacher has 6 channels and model.repa_dim is 7"):
        step.setup(model, Losses({}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: built(losses={"mse": LossSpec(Weighting(), {"name": "mse"})}), r"Remove losses\.mse"),
        (lambda: built({"repa_dim": 4}), "nothing trains"),
        (lambda: built(empty=1.0), "probability below 1"),
        (lambda: create("step", name="flow").setup(vistok.create("tokenizer", "titok_tiny"), Losses({})), "got TiTok"),
    ],
)
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """DINOv2-S of timm with random weights, saved as its file would be."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(2)
    vit = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0).eval()
    path = tmp_path_factory.mktemp("dino") / "model.safetensors"
    save_file(vit.state_dict(), path)
    return path, vit


def test_teacher_is_timms_dinov2_with_normalised_input(dino):
    path, vit = dino
    repa, images = Repa(teacher="small", image_size=28, grid=3, weights=path), torch.rand(2, 3, 28, 28)
    found = repa.features(images)
    assert found.shape == (2, 2, 2, 384) and repa.width == 384
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    vit.set_input_size((28, 28))
    with torch.no_grad():
        tokens = vit.forward_features((images - mean[:, None, None]) / std[:, None, None])[:, 1:]
    torch.testing.assert_close(found, tokens.unflatten(1, (2, 2)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(repa(found, images), torch.full((2,), -1.0))
    torch.testing.assert_close(repa(-3 * found, images), torch.full((2,), 1.0))
    assert not list(repa.parameters()) and not repa.state_dict()
    with pytest.raises(ValueError, match="Set the model's repa_dim to 384"):
        repa(found[..., :5], images)


def test_a_teacher_of_another_size_is_refused(dino):
    from vistok.assets import AssetError

    with pytest.raises(AssetError, match="no DINOv2 of this size"):
        Repa(teacher="base", image_size=28, weights=dino[0])
    with pytest.raises(ValueError, match="multiple of 14"):
        Repa(teacher="small", image_size=30, weights=dino[0])
