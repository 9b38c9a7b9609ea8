"""Warnings about runs that go wrong, and gradient norms per loss."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.train.tiny import recipe
from vistok.train import log
from vistok.train.log import gradient_norms
from vistok.train.loop import train
from vistok.train.steps.base import Part
from vistok.train.watch import PATIENCE, Watch


def test_saturated_discriminator_is_told_once_after_a_while():
    watch = Watch()
    with pytest.warns(UserWarning, match=r"99\.5% of the time.*discriminator\.lr") as seen:
        for step in range(3 * PATIENCE):
            watch.look({"step": step, "discriminator/accuracy": 0.995})
    assert len(seen) == 1 and f"Step {PATIENCE - 1}:" in str(seen[0].message)


def test_discriminator_that_is_always_wrong_is_told():
    watch = Watch()
    with pytest.warns(UserWarning, match=r"right only 0\.5% of the time.*Raise its learning rate") as seen:
        for step in range(2 * PATIENCE):
            watch.look({"step": step, "discriminator/accuracy": 0.005})
    assert len(seen) == 1


@pytest.mark.parametrize("accuracy", [0.02, 0.5, 0.98])
def test_discriminator_in_the_fight_is_not_told(accuracy):
    watch = Watch()
    with warnings.catch_warnings(action="error"):
        for step in range(2 * PATIENCE):
            watch.look({"step": step, "discriminator/accuracy": accuracy})


def test_a_good_line_in_between_starts_the_count_anew():
    watch = Watch()
    with warnings.catch_warnings(action="error"):
        for step in range(4 * PATIENCE):
            watch.look({"step": step, "quantizer/usage": 0.5 if step % (PATIENCE - 1) == 0 else 0.001})


def test_collapsed_code_book_is_told():
    watch = Watch()
    with pytest.warns(UserWarning, match=r"Only 0\.10% of the code book"):
        for step in range(PATIENCE):
            watch.look({"step": step, "quantizer/usage": 0.001})


def test_gradient_norms_are_weighted_and_leave_the_gradient_alone():
    layer = nn.Linear(3, 1, bias=False)
    near, far = layer(torch.ones(3)).sum(), 10 * layer(torch.ones(3)).sum()
    elsewhere = nn.Parameter(torch.ones(())) * 2
    terms = {"near": near, "far": far, "elsewhere": elsewhere}
    part = Part("model", near + far, terms, weights={"near": 2.0, "far": 0.5, "elsewhere": 1.0})
    norms = gradient_norms(part, layer.weight, Accelerator(cpu=True))
    assert {k: round(float(v), 4) for k, v in norms.items()} == {
        "grad_norm_of/near": round(2 * 3**0.5, 4),
        "grad_norm_of/far": round(5 * 3**0.5, 4),
    }
    assert layer.weight.grad is None


def test_gradient_norm_of_every_pixel_loss_is_logged(tmp_path):
    train(recipe(tmp_path, {"losses": {"l1": 0.1}}))
    for row in log.read(tmp_path / log.METRICS):
        assert row["grad_norm_of/mse"] > 0 and row["grad_norm_of/l1"] > 0
        assert "grad_norm_of/quantizer" not in row
