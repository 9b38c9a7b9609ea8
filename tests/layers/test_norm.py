"""Batch norm over processes, and over small groups."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from tests.layers import batch_norm_processes as bn
from vistok.layers.norm import AllReduceBatchNorm2d, LocalBatchNorm1d


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_one_process_gives_what_torch_gives(options, training):
    ours, torchs = bn.norm(AllReduceBatchNorm2d, **options), bn.norm(nn.BatchNorm2d, **options)
    results = []
    for layer in (ours, torchs):
        layer(bn.joint() * 0.3)
        x = bn.joint().requires_grad_()
        out = layer.train(training)(x)
        (gradient,) = torch.autograd.grad(out.square().sum() + out.sin().sum(), x)
        results.append([out, gradient, *layer.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_state_dict_has_the_keys_of_torchs_layer():
    assert list(AllReduceBatchNorm2d(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(bn.work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{r}.pt") for r in range(2)]


@pytest.fixture(scope="module")
def alone():
    return bn.two_steps(bn.norm(nn.BatchNorm2d), bn.joint())


@pytest.mark.dist
@pytest.mark.parametrize("split", bn.SPLITS)
@pytest.mark.parametrize("what", ["out", "slope", "x"])
def test_two_processes_give_each_sample_its_share_of_the_joint_batch(ranks, alone, split, what):
    found = torch.cat([r[split][what] for r in ranks])
    torch.testing.assert_close(found, alone[what], rtol=1e-4, atol=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize("split", bn.SPLITS)
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_weight_gradients_of_two_processes_add_up_to_those_of_the_joint_batch(ranks, alone, split, what):
    torch.testing.assert_close(ranks[0][split][what] + ranks[1][split][what], alone[what], rtol=1e-4, atol=1e-4)


@pytest.mark.dist
@pytest.mark.parametrize("split", bn.SPLITS)
def test_both_processes_keep_the_running_statistics_of_the_joint_batch(ranks, alone, split):
    for key in (k for k in alone if k.startswith("state")):
        assert torch.equal(ranks[0][split][key], ranks[1][split][key])
        torch.testing.assert_close(ranks[0][split][key], alone[key])


@pytest.mark.parametrize("samples", [1, 8, 16])
def test_groups_of_eight_are_normalised_apart(samples):
    x = torch.randn(samples, 3, 5) * torch.arange(1.0, samples + 1)[:, None, None]
    layer = LocalBatchNorm1d(3)
    apart = torch.cat([layer(part) for part in x.split(8)])
    torch.testing.assert_close(layer(x), apart)
    assert layer(x)[:8].mean().abs() < 1e-6


def test_a_batch_that_does_not_divide_into_groups_is_taken():
    assert LocalBatchNorm1d(3)(torch.randn(11, 3, 5)).shape == (11, 3, 5)


def test_local_norm_in_evaluation_is_that_of_training():
    x, layer = torch.randn(4, 3, 5), LocalBatchNorm1d(3)
    assert torch.equal(layer(x), layer.eval()(x))
