"""TiTok's training stages: distillation from proxy codes, and reconstruction against a discriminator."""

from __future__ import annotations

import json

import pytest
import torch

import vistok
from tests.train.tiny import recipe, weights
from vistok.config import create
from vistok.data.base import Batch
from vistok.train import checkpoint
from vistok.train.loop import train
from vistok.train.recipe import from_dict
from vistok.train.steps.base import Losses, LossSpec, Weighting

SIZE = {"width": 32, "depth": 1, "heads": 2}
TWO_STAGE = {
    "name": "titok_two_stage",
    "image_size": 32,
    "num_tokens": 4,
    "encoder": SIZE,
    "decoder": SIZE,
    "quantizer": {"name": "vq", "codebook_size": 32, "dim": 4},
    "proxy_codes": 16,
    "proxy_dim": 4,
    "pixel_channels": 32,
}
GAN = {
    "losses": {"adversarial": {"weight": 0.1, "start": 2}},
    "optim": {"parts": {"discriminator": {"name": "adamw", "lr": 1e-3}}},
    "train": {
        "step": {
            "name": "reconstruct_gan",
            "discriminator": {"name": "titok_discriminator", "width": 32, "stages": 2, "grid": 4},
            "gan": {"name": "hinge_gan", "lecam": 0.001},
        }
    },
}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("proxy")
    tok = vistok.create("tokenizer", "maskgit_vqgan", image_size=32, codebook_size=16, code_dim=4, channels=32)
    return tok.eval().save_pretrained(folder)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_stage_one_learns_the_proxy_codes_and_leaves_a_model_that_decodes(tmp_path, proxy):
    values = recipe(tmp_path, {"optim": {"lr": 3e-3}, "train": {"steps": 30, "global_batch": 8}}).resolved()
    values |= {"model": TWO_STAGE, "losses": {"proxy": {"weight": 1.0}}}
    values["train"] |= {"step": {"name": "distil", "proxy": str(proxy)}}
    result = train(from_dict(values))
    logged = [r["loss/proxy"] for r in rows(tmp_path) if "loss/proxy" in r]
    assert logged[-1] < 0.8 * logged[0]
    tok = vistok.load(result.out / "tokenizer")
    original = vistok.load(proxy)
    assert torch.equal(tok.pixel_codebook.weight, original.quantizer.embedding.weight)
    assert torch.equal(tok.pixel_decoder.conv_out.weight, original.decoder.conv_out.weight)


def test_proxy_of_another_size_is_refused(proxy):
    model = vistok.create("tokenizer", **{**TWO_STAGE, "proxy_dim": 8})
    with pytest.raises(ValueError, match="16 codes of 4 channels, width 32 and 32 groups. Set proxy_codes, proxy_dim"):
        create("step", "distil", proxy=str(proxy)).setup(model, Losses({}))


def test_stage_one_refuses_pixel_losses(proxy):
    model = vistok.create("tokenizer", **TWO_STAGE)
    losses = Losses({"mse": LossSpec(Weighting(), {"name": "mse"})})
    with pytest.raises(ValueError, match=r"no pixel losses. Remove losses\.mse"):
        create("step", "distil", proxy=str(proxy)).setup(model, losses)


def test_discriminator_is_untouched_before_its_start_and_learns_after(tmp_path):
    train(recipe(tmp_path / "short", {**GAN, "train": {**GAN["train"], "steps": 2, "save_every": 1, "keep": 6}}))
    first, second = (weights(tmp_path / "short", s, "discriminator") for s in (1, 2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    train(recipe(tmp_path / "long", {**GAN, "train": {**GAN["train"], "steps": 3, "save_every": 1, "keep": 6}}))
    third = weights(tmp_path / "long", 3, "discriminator")
    assert not any(torch.equal(first[k], third[k]) for k in first if k.endswith("weight"))


def test_training_against_a_discriminator_continues_bit_identically(tmp_path):
    train(recipe(tmp_path / "whole", GAN))
    resumed = tmp_path / "resumed"
    train(recipe(resumed, GAN))
    last = checkpoint.folders(resumed)[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()  # as if killed after step 3
    train(recipe(resumed, GAN))
    for name in ("model", "discriminator"):
        a, b = weights(tmp_path / "whole", 6, name), weights(resumed, 6, name)
        assert all(torch.equal(a[k], b[k]) for k in a)


def built(**over):
    model = vistok.create("tokenizer", "titok_tiny")
    step = create("step", **{**GAN["train"]["step"], **over})
    mse = LossSpec(Weighting(), {"name": "mse"})
    step.setup(model, Losses({"mse": mse, "adversarial": LossSpec(Weighting(weight=0.1), None)}))
    return model, step


def batch():
    return Batch(images=torch.rand(2, 3, 64, 64), positions=torch.arange(2))


def test_generator_turn_leaves_no_gradient_in_the_discriminator():
    _, step = built()
    parts = step.run(batch(), 0, torch.Generator())
    part = next(parts)
    part.loss.backward()
    assert all(p.grad is None for p in step.net.parameters())
    next(parts).loss.backward()
    assert all(p.grad is not None for p in step.net.parameters())


def test_discriminator_turn_leaves_no_gradient_in_the_model():
    model, step = built()
    _, part = list(step.run(batch(), 0, torch.Generator()))
    part.loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_adaptive_weight_balances_the_gradients_at_the_last_layer():
    model, step = built(adaptive=True)
    part = next(step.run(batch(), 0, torch.Generator()))
    plain = part.loss - 0.1 * part.terms["adversarial"]
    norms = [
        torch.autograd.grad(x, model.last_layer, retain_graph=True)[0].norm()
        for x in (plain, part.terms["adversarial"])
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-2, atol=0)


def test_r1_penalty_counts_every_so_many_steps():
    _, step = built(r1_gamma=2.0, r1_every=2)
    with_r1, without = (list(step.run(batch(), s, torch.Generator()))[1] for s in (0, 1))
    assert with_r1.terms["r1"] > 0
    assert "r1" not in without.terms


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"gan": {"name": "mse"}}, "'mse' is no adversarial loss"),
        ({"discriminator": {"name": "mse"}}, "'mse' is no discriminator"),
    ],
)
def test_wrong_component_is_named(over, message):
    with pytest.raises(ValueError, match=message):
        built(**over)


def test_frozen_quantizer_keeps_its_codebook_and_statistics(tmp_path):
    moving = {"name": "cvq", "codebook_size": 32, "dim": 4}
    train(
        recipe(
            tmp_path,
            {
                "model": {"quantizer": moving},
                "train": {"freeze": ["encoder.*", "quantizer.*"], "save_every": 1, "keep": 6},
            },
        )
    )
    first, last = weights(tmp_path, 1), weights(tmp_path, 6)
    changed = {k.split(".")[0] for k in first if not torch.equal(first[k], last[k])}
    assert changed == {"decoder", "head"}
