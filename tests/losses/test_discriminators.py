"""Discriminators by their published keys, sizes and arithmetic; each with R1 and in step reconstruct_gan."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vistok
from tests.fill import fill_module, image
from tests.losses.test_dino_discriminator import tiny_weights  # noqa: F401
from tests.train.tiny import recipe
from vistok.losses.adversarial import r1_penalty
from vistok.losses.discriminators import LowPass, ScaledConv2d, group_deviation
from vistok.train.loop import train

TINY = {
    "patchgan_discriminator": {"width": 8, "layers": 2},
    "stylegan_discriminator": {"image_size": 32, "channels": 256, "widest": 16, "group": 2},
    "titok_discriminator": {"width": 32, "stages": 2, "grid": 4},
}
PATCHGAN_KEYS = [
    "main.0.weight", "main.0.bias", "main.2.weight", "main.3.weight", "main.3.bias", "main.3.running_mean",
    "main.3.running_var", "main.3.num_batches_tracked", "main.5.weight", "main.6.weight", "main.6.bias",
    "main.6.running_mean", "main.6.running_var", "main.6.num_batches_tracked", "main.8.weight", "main.9.weight",
    "main.9.bias", "main.9.running_mean", "main.9.running_var", "main.9.num_batches_tracked", "main.11.weight",
    "main.11.bias",
]  # fmt: skip


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_patchgan_has_the_published_keys_and_size():
    model = vistok.create("loss", "patchgan_discriminator")
    assert list(model.state_dict()) == PATCHGAN_KEYS
    assert count(model) == 2_765_633


def test_patchgan_is_the_published_stack_of_layers():
    model = fill_module(vistok.create("loss", "patchgan_discriminator"))
    norms = {1: nn.BatchNorm2d(128), 2: nn.BatchNorm2d(256), 3: nn.BatchNorm2d(512)}
    state = model.state_dict()
    x = F.leaky_relu(F.conv2d(2 * image(2, 64) - 1, state["main.0.weight"], state["main.0.bias"], 2, 1), 0.2)
    for i, norm in norms.items():
        norm.weight, norm.bias = nn.Parameter(state[f"main.{3 * i}.weight"]), nn.Parameter(state[f"main.{3 * i}.bias"])
        x = F.leaky_relu(norm(F.conv2d(x, state[f"main.{3 * i - 1}.weight"], None, 2 if i < 3 else 1, 1)), 0.2)
    expected = F.conv2d(x, state["main.11.weight"], state["main.11.bias"], 1, 1)
    torch.testing.assert_close(model(image(2, 64)), expected)


def test_patchgan_starts_from_narrow_weights():
    model = vistok.create("loss", "patchgan_discriminator")
    assert float(model.main[5].weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.main[6].weight.detach().mean()) == pytest.approx(1.0, abs=0.01)
    assert 0 < float(model.main[6].weight.detach().std()) < 0.03 and not model.main[6].bias.any()


def test_a_logit_of_patchgan_sees_70_pixels():
    model = vistok.create("loss", "patchgan_discriminator", width=8).eval()
    x = image(1, 256).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, 0, 15, 15], x)
    rows = gradient[0].abs().sum((0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_patchgan_refuses_pictures_that_leave_no_logit():
    model = vistok.create("loss", "patchgan_discriminator", width=8)
    assert model(image(2, 32)[..., :24, :24]).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 24 x 24 pixels and got 16 x 16. Build it with fewer layers"):
        model(image(1, 16))


@pytest.mark.parametrize(("group", "parameters"), [(0, 23_996_481), (4, 24_001_089)])
def test_stylegan_at_256_pixels_has_24_million_parameters(group, parameters):
    with torch.device("meta"):
        assert count(vistok.create("loss", "stylegan_discriminator", group=group)) == parameters


def test_stylegan_has_the_keys_of_the_pytorch_port():
    model = vistok.create("loss", "stylegan_discriminator", image_size=8, channels=64, widest=8)
    block = ["conv1.0.weight", "conv1.1.bias", "conv2.0.kernel", "conv2.1.weight", "conv2.2.bias"]
    block += ["skip.0.kernel", "skip.1.weight"]
    head = ["final_conv.0.weight", "final_conv.1.bias"]
    head += [f"final_linear.{i}.{w}" for i in (0, 1) for w in ("weight", "bias")]
    assert list(model.state_dict()) == ["convs.0.0.weight", "convs.0.1.bias", *(f"convs.1.{k}" for k in block), *head]


def test_low_pass_of_a_strided_short_cut_is_that_of_the_port():
    x, conv = torch.randn(2, 3, 8, 8), ScaledConv2d(3, 5, 1)
    late = F.conv2d(LowPass(1)(x), conv.weight * conv.gain, stride=2)
    torch.testing.assert_close(conv(LowPass(1, stride=2)(x)), late)


def test_activations_of_stylegan_keep_their_scale_from_layer_to_layer():
    model = vistok.create("loss", "stylegan_discriminator", image_size=32, channels=2048, widest=64)
    x = torch.randn(64, 3, 1, 1).expand(-1, -1, 32, 32)  # nothing for the low-pass filters to take away
    for block in model.convs:
        x = block(x)
        assert 0.6 < x.square().mean().sqrt() < 1.4


@pytest.mark.parametrize("side", [4, 24, 100])
def test_stylegan_refuses_a_side_that_is_no_power_of_two(side):
    with pytest.raises(ValueError, match=f"a power of two from 8 on, got {side}"):
        vistok.create("loss", "stylegan_discriminator", image_size=side)


def test_stylegan_refuses_pictures_of_another_size():
    with pytest.raises(ValueError, match="built for 32 x 32 pixels and got 64 x 64"):
        vistok.create("loss", "stylegan_discriminator", **TINY["stylegan_discriminator"])(image(1, 64))


def test_deviation_over_a_group_is_that_of_its_samples():
    x = torch.zeros(4, 2, 4, 4)
    x[0], x[2] = 1.0, -1.0  # samples 0 and 2 are a group of two, 1 and 3 the other
    found = group_deviation(x, 2)
    assert found.shape == (4, 1, 4, 4)
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([1.0, 1e-4, 1.0, 1e-4]))


def test_a_batch_that_does_not_divide_is_one_group():
    x = torch.randn(3, 2, 4, 4)
    found = group_deviation(x, 2)
    assert found.unique().numel() == 1
    assert float(found[0, 0, 0, 0]) == pytest.approx(float((x.var(0, unbiased=False) + 1e-8).sqrt().mean()))


@pytest.mark.parametrize("name", TINY)
def test_r1_reaches_every_weight(name):
    model = vistok.create("loss", name, **TINY[name])
    r1_penalty(model, image(2, 32)).mean().backward()
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in weights.values())


@pytest.mark.parametrize("name", TINY)
def test_r1_is_the_slope_of_the_logits(name):
    model = vistok.create("loss", name, **TINY[name]).double().eval()
    x, step = image(1, 32).double(), 1e-7  # small enough to cross no kink of a leaky ReLU
    direction = torch.randn_like(x)
    slope = ((model(x + step * direction) - model(x - step * direction)).sum() / (2 * step)).item()
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(y).sum(), y)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-4)
    assert math.isclose(r1_penalty(model, x).item(), gradient.square().sum().item(), rel_tol=1e-5)


@pytest.mark.parametrize("name", ["patchgan_discriminator", "stylegan_discriminator", "dino_discriminator"])
def test_it_trains_in_a_recipe_with_r1(name, tmp_path, tiny_weights):  # noqa: F811
    settings = {**TINY, "dino_discriminator": {"read_outs": [0], "weights": str(tiny_weights)}}[name]
    step = {"name": "reconstruct_gan", "discriminator": {"name": name, **settings}, "gan": {"name": "hinge_gan"}}
    over = {
        "losses": {"adversarial": {"weight": 0.1}},
        "optim": {"parts": {"discriminator": {"name": "adamw", "lr": 1e-3}}},
        "train": {"step": {**step, "r1_gamma": 1.0, "r1_every": 1}, "steps": 2, "global_batch": 2, "log_every": 1},
    }
    train(recipe(tmp_path, over))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [row for row in rows if "loss/r1" in row]
    assert len(seen) == 2
    for row in seen:
        assert row["skipped_steps"] == 0 and row["loss/r1"] > 0 and row["grad_norm/discriminator"] > 0
        assert row["grad_norm_of/adversarial"] > 0 and 0 <= row["discriminator/accuracy"] <= 1
