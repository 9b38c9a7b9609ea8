"""Pixel losses follow the protocol: one float32 value per picture."""

from __future__ import annotations

import math

import pytest
import torch

import vistok
from tests.fill import image


@pytest.mark.parametrize(("name", "expected"), [("mse", [0.04, 0.01]), ("l1", [0.2, 0.1])])
def test_one_value_per_picture(name, expected):
    y = torch.zeros(2, 3, 8, 8)
    x = torch.stack((y[0] + 0.2, y[1] - 0.1))
    torch.testing.assert_close(vistok.create("loss", name)(x, y), torch.tensor(expected))


@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1"])
def test_half_precision_input_gives_a_float32_loss(name):
    assert vistok.create("loss", name)(image(1, 16).bfloat16(), image(1, 16)).dtype == torch.float32


@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1"])
def test_different_shapes_are_refused(name):
    with pytest.raises(ValueError, match="of one shape"):
        vistok.create("loss", name)(image(1, 16), image(2, 16))


def test_log_mse_is_the_mean_psnr_in_other_units():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(3, 3, 8, 8, generator=draw), torch.rand(3, 3, 8, 8, generator=draw)
    psnr = -10 * (x - y).square().flatten(1).mean(1).log10()
    found = vistok.create("loss", "log_mse", floor=0.0)(x, y)
    torch.testing.assert_close(found * -10 / math.log(10), psnr)
    assert torch.isfinite(vistok.create("loss", "log_mse")(x, x)).all()


def test_smooth_l1_of_pictures_in_0_1_is_half_that_of_pictures_in_minus_1_1():
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    wide = torch.nn.functional.smooth_l1_loss(2 * x - 1, 2 * y - 1, reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(2 * vistok.create("loss", "smooth_l1")(x, y), wide)
    with pytest.raises(ValueError, match="beta must be positive"):
        vistok.create("loss", "smooth_l1", beta=0.0)
