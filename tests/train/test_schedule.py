"""Learning rates and loss weights as functions of the step."""

from __future__ import annotations

import itertools

import pytest

from vistok.train.schedule import lr_at
from vistok.train.steps.base import Weighting


def test_warmup_rises_linearly_to_the_peak():
    assert [lr_at(s, lr=1.0, steps=100, warmup=4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("shape", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)])
def test_shapes_run_from_peak_to_final(shape, middle, end):
    rates = [lr_at(s, lr=1.0, steps=110, warmup=10, final_lr=0.1, shape=shape) for s in (10, 60, 110)]
    assert rates == pytest.approx([1.0, middle, end])


def test_cosine_quarter_is_above_linear():
    assert lr_at(25, lr=1.0, steps=100) == pytest.approx(0.8535534)


def test_time_limit_takes_over_when_it_is_ahead():
    assert lr_at(10, lr=1.0, steps=100, shape="linear", spent=0.9) == pytest.approx(0.1)
    assert lr_at(50, lr=1.0, steps=100, shape="linear", spent=0.2) == pytest.approx(0.5)


def test_loss_weight_starts_and_ramps():
    weighting = Weighting(weight=2.0, start=3, ramp=3)
    assert [weighting.at(s) for s in range(8)] == [0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_exponential_falls_by_one_factor_and_ends_where_it_should():
    rates = [lr_at(s, lr=1.0, steps=10, final_lr=0.5, shape="exponential") for s in range(11)]
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([0.5**0.1] * 10)
    assert rates[-1] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="ends above 0, got final_lr=0.0"):
        lr_at(0, lr=1.0, steps=10, shape="exponential")
