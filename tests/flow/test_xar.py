"""The flow on a real network: losses, SDE and ODE samples of the official xAR (golden `xar_small`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.flow.xar_net import XarNet, cell_order
from vistok.flow import CFG, EulerMaruyamaSampler, EulerSampler, RectifiedFlow

pytestmark = pytest.mark.parity
EMPTY = 1000


@pytest.fixture
def net(golden):
    return XarNet(golden("xar_small").state_dict(), heads=2)


def drawn(ref):
    """Labels, start noises and noises of the stochastic sampler, as the golden file's meta says."""
    args, rng = ref.meta["args"], np.random.default_rng(ref.meta["args"]["sseed"])
    labels = torch.from_numpy(rng.integers(0, 1000, size=args["B"]))
    start = torch.from_numpy(rng.standard_normal((4, args["B"], 64, 16)).astype(np.float32)).double()
    noises = torch.from_numpy(rng.standard_normal((4, args["steps"] - 1, args["B"], 64, 16)))
    return labels, start, noises


def field(net, labels, done):
    """Velocity of the cell behind the finished ones, which are clean: their time is 0."""

    def velocity(x, t, branches=1):
        times = torch.tensor([0.0] * (done.shape[1] // 64) + [t]).expand(len(labels), -1)
        seen = torch.cat([done, x.float()], 1)
        found = [labels, torch.full_like(labels, EMPTY)][:branches]
        return [net(seen, label, times)[:, -64:].double() for label in found]

    return velocity


def sample(net, ref, sampler, scale, stochastic):
    """Cell after cell, every one a flow from noise that sees the finished cells."""
    labels, start, noises = drawn(ref)
    done = torch.zeros(len(labels), 0, 16)
    for cell in range(4):
        options = {"noises": list(noises[cell])} if stochastic else {}
        guidance = CFG((scale - 1) * cell / 3 + 1)
        x = sampler(field(net, labels, done), start[cell], guidance, **options)
        done = torch.cat([done, x.float()], 1)
    latents = torch.empty_like(done)
    latents[:, cell_order()] = done
    return latents.transpose(1, 2).unflatten(2, (16, 16))


def test_training_velocity_and_loss_match(golden, net):
    ref = golden("xar_small")
    batch, rng = ref.meta["args"]["B"], np.random.default_rng(ref.meta["args"]["tseed"])
    latents = torch.from_numpy(rng.standard_normal((batch, 16, 16, 16)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 1000, size=batch))
    noise = torch.from_numpy(rng.standard_normal((4, batch, 64, 16)).astype(np.float32))
    t = RectifiedFlow.from_normal(torch.from_numpy(rng.standard_normal(4 * batch).astype(np.float32))).view(4, batch)
    labels = torch.where(torch.from_numpy(rng.random(batch)) < 0.1, EMPTY, labels)
    cells = latents.flatten(2).transpose(1, 2)[:, cell_order()].unflatten(1, (4, 64)).transpose(0, 1)
    flow = RectifiedFlow()
    data, eps, times = (y.flatten(0, 1) for y in (cells, noise, t))
    x_t = flow.add_noise(data, eps, times).unflatten(0, (4, batch)).transpose(0, 1).flatten(1, 2)
    velocity = net(x_t, labels, t.T)
    torch.testing.assert_close(velocity[:, ::3], ref["train_velocity"], rtol=1e-4, atol=2e-5)
    per_cell = velocity.unflatten(1, (4, 64)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(flow.loss(per_cell, data, eps).mean(), ref["train_loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("key", "scale", "stride"), [("sample_sde", 3.0, 1), ("sample_sde_cfg1", 1.0, 2)])
def test_stochastic_samples_match(golden, net, key, scale, stride):
    ref = golden("xar_small")
    found = sample(net, ref, EulerMaruyamaSampler(ref.meta["args"]["steps"]), scale, stochastic=True)
    torch.testing.assert_close(found[:, ::stride], ref[key], rtol=0, atol=2e-4)


def test_deterministic_samples_match(golden, net):
    ref = golden("xar_small")
    found = sample(net, ref, EulerSampler(ref.meta["args"]["steps"]), ref.meta["args"]["cfg"], stochastic=False)
    torch.testing.assert_close(found[:, ::2], ref["sample_ode"], rtol=0, atol=2e-4)
