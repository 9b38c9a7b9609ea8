"""Adversarial losses and regularisers against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vistok
from tests.fill import image
from vistok.losses.adversarial import adaptive_weight, r1_penalty
from vistok.losses.discriminators import BlurDownsample

GANS = ["hinge_gan", "non_saturating_gan", "magvit_gan"]


def test_hinge_is_zero_beyond_the_margin():
    terms = vistok.create("loss", "hinge_gan").discriminator(torch.full((2, 1), 1.5), torch.full((2, 1), -1.5))
    assert terms.loss == 0
    assert terms.accuracy == 1


def test_hinge_of_undecided_logits_is_one():
    assert vistok.create("loss", "hinge_gan").discriminator(torch.zeros(2, 1), torch.zeros(2, 1)).loss == 1


def test_non_saturating_loss_of_undecided_logits_is_log_two():
    gan = vistok.create("loss", "non_saturating_gan")
    assert float(gan.discriminator(torch.zeros(2, 1), torch.zeros(2, 1)).loss) == pytest.approx(math.log(2))
    assert gan.generator(torch.zeros(2, 1, 4, 4)).tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("name", GANS)
def test_generator_and_discriminator_pull_in_opposite_directions(name):
    gan = vistok.create("loss", name)
    fake = torch.zeros(3, 1, 2, 2, requires_grad=True)
    up = torch.autograd.grad(gan.generator(fake).sum(), fake)[0]
    down = torch.autograd.grad(gan.discriminator(torch.zeros(3, 1), fake).loss, fake)[0]
    assert (up < 0).all() and (down > 0).all()


@pytest.mark.parametrize("name", GANS)
def test_half_precision_logits_give_a_finite_float32_loss(name):
    gan = vistok.create("loss", name, lecam=0.1)
    loss = gan.discriminator(torch.full((2, 1), -3e4).half(), torch.full((2, 1), 3e4).half()).loss
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_lecam_punishes_real_above_the_fake_mean_and_fake_below_the_real_one():
    gan = vistok.create("loss", "hinge_gan", lecam=1.0)
    gan.real_mean, gan.fake_mean = torch.tensor(0.5), torch.tensor(-0.5)
    terms = gan.discriminator(torch.full((2, 1), 1.0), torch.full((2, 1), -1.0))
    assert float(terms.lecam) == pytest.approx(1.5**2 + 1.5**2)


def test_magvit_generator_sees_the_mean_logit_and_its_lecam_updates_first_and_squares_single_logits():
    gan = vistok.create("loss", "magvit_gan", lecam=1.0, lecam_decay=0.5)
    fake = torch.tensor([[-3.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(gan.generator(fake), torch.nn.functional.softplus(torch.tensor([1.0, 0.0])))
    real = torch.tensor([[3.0, 1.0]])
    terms = gan.discriminator(real, -real)
    assert (float(gan.real_mean), float(gan.fake_mean)) == (1.0, -1.0)
    assert float(terms.lecam) == pytest.approx(2 * (4.0**2 + 2.0**2) / 2)
    assert float(terms.adversarial) == 0.0


def test_lecam_means_are_saved():
    gan = vistok.create("loss", "hinge_gan", lecam=1.0)
    gan.discriminator(torch.ones(2, 1), -torch.ones(2, 1))
    other = vistok.create("loss", "hinge_gan", lecam=1.0)
    other.load_state_dict(gan.state_dict())
    assert float(other.real_mean) == pytest.approx(1e-3, rel=1e-4)


def test_lecam_that_is_off_keeps_no_means():
    gan = vistok.create("loss", "hinge_gan")
    gan.discriminator(torch.ones(2, 1), -torch.ones(2, 1))
    assert gan.real_mean == 0


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weights():
    weight = torch.randn(3, 8, 8, requires_grad=True)
    penalty = r1_penalty(lambda x: (x * weight).flatten(1).sum(1), image(2, 16)[..., :8, :8])
    torch.testing.assert_close(penalty, weight.square().sum().expand(2))
    (gradient,) = torch.autograd.grad(penalty.mean(), weight)
    torch.testing.assert_close(gradient, 2 * weight)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    layer = nn.Parameter(torch.ones(4))
    reconstruction, adversarial = (3.0 * layer).sum(), (0.5 * layer).sum()
    assert float(adaptive_weight(reconstruction, adversarial, layer)) == pytest.approx(6.0, rel=1e-3)
    assert float(adaptive_weight(reconstruction, 0.0 * adversarial, layer, largest=10.0)) == 10.0


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5)])
def test_blur_halves_rounding_up_and_keeps_a_constant_inside(size):
    blurred = BlurDownsample()(torch.ones(1, 2, *size))
    assert blurred.shape[2:] == tuple(math.ceil(s / 2) for s in size)
    assert torch.allclose(blurred[..., 1:-1, 1:-1], torch.ones(()))


def test_discriminator_takes_any_size_and_gives_its_grid():
    model = vistok.create("loss", "titok_discriminator", width=32, stages=2, grid=4)
    assert model(image(2, 48)[..., :41]).shape == (2, 1, 4, 4)
