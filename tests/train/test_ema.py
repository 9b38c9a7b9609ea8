"""Averaged weights."""

from __future__ import annotations

import torch
from torch import nn

from vistok.train.ema import EMA


def test_first_update_copies_then_decay_warms_up_as_published():
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, decay=0.999)
    expected = None
    for t, value in enumerate([1.0, 3.0, -2.0, 5.0]):
        module.weight.data.fill_(value)
        ema.update()
        decay = min(0.999, (1 + t) / (10 + t)) if t else 0.0
        expected = value if expected is None else decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.average["weight"], torch.tensor([[expected]]))


def test_decay_ends_at_its_limit():
    module = nn.Linear(1, 1, bias=False)
    ema = EMA(module, decay=0.5)
    ema.updates = 1000
    ema.average["weight"].zero_()
    module.weight.data.fill_(1.0)
    ema.update()
    assert ema.average["weight"].item() == 0.5


def test_applied_swaps_and_puts_back_even_after_an_error():
    module = nn.Linear(2, 2)
    ema = EMA(module, decay=0.9)
    before = module.weight.detach().clone()
    ema.average["weight"].fill_(7.0)
    try:
        with ema.applied():
            assert (module.weight == 7.0).all()
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(module.weight, before) and (ema.average["weight"] == 7.0).all()


def test_frozen_parameters_are_copied():
    module = nn.Linear(2, 2)
    ema = EMA(module, decay=0.9)
    module.bias.requires_grad_(False).fill_(3.0)
    ema.update()
    ema.update()
    assert (ema.average["bias"] == 3.0).all()
