"""Optimisers: groups, freezing, Muon."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vistok
from vistok.config import ConfigError
from vistok.train import optim
from vistok.train.muon import orthogonalise


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4))


def decays(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(p): n for n, p in module.named_parameters()}
    return {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


def test_titok_decays_matrices_only():
    model = vistok.create("tokenizer", "titok_tiny")
    found = decays(model, optim.AdamW(lr=1e-3, weight_decay=0.1).build(model))
    assert found["encoder.transformer.blocks.0.mlp.fc1.weight"] == 0.1
    free = ["encoder.patch_embed.weight", "encoder.position", "encoder.latents", "decoder.mask_token"]
    assert [found[name] for name in free] == [0.0] * 4
    assert all(found[n] == 0.0 for n, p in model.named_parameters() if p.ndim < 2)


def test_lr_scale_slows_named_parameters():
    optimizer = optim.AdamW(lr=1.0, lr_scale={"0.*": 0.2}).build(network())
    optim.set_lr(optimizer, 0.5)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.1, 0.5]


def test_lr_scale_may_name_what_is_frozen():
    net = network()
    optim.freeze(net, ("0.*",))
    optimizer = optim.AdamW(lr=1.0, lr_scale={"0.*": 0.2}).build(net)
    assert [group["scale"] for group in optimizer.param_groups] == [1.0] * len(optimizer.param_groups)


def test_lr_scale_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"optim\.lr_scale.*'encoder\.\*'.*Names look like '0\.weight'"):
        optim.AdamW(lr=1.0, lr_scale={"encoder.*": 0.2}).build(network())


def test_freeze_takes_patterns_and_refuses_what_fits_nothing():
    module = network()
    assert optim.freeze(module, ["0.*", "1.bias"]) == [module[0]]
    assert not module[0].weight.requires_grad and module[1].weight.requires_grad
    with pytest.raises(ValueError, match=r"train\.freeze.*'7\.\*'"):
        optim.freeze(module, ["7.*"])


def test_all_frozen_is_an_error():
    module = network().requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        optim.AdamW(lr=1.0).build(module)


def test_missing_lr_is_named():
    with pytest.raises(ConfigError, match=r"optim\.lr: optimiser 'adamw' needs this key"):
        optim.check({"name": "adamw"}, "optim")


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 40, 10), (2, 10, 40)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.3 and values.max() < 1.3


def test_newton_schulz_keeps_the_singular_vectors():
    x = torch.randn(12, 8)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    middle = u.T @ orthogonalise(x[None], 5)[0] @ v.T
    assert (middle - middle.diag().diag()).abs().max() < 1e-4


def test_muon_takes_hidden_matrices_only():
    optimizer = optim.Muon(not_matrices=("3.*",)).build(network())
    hidden = [p for g in optimizer.param_groups if g["matrices"] for p in g["params"]]
    assert [tuple(p.shape) for p in hidden] == [(16, 8), (16, 16)]


def test_muon_update_has_the_size_of_an_adamw_update():
    module = nn.Linear(64, 64, bias=False)
    before = module.weight.detach().clone()
    optimizer = optim.Muon(lr=0.1, weight_decay=0.0).build(module)
    module(torch.randn(256, 64)).square().sum().backward()
    optimizer.step()
    assert 0.1 * 0.15 < (module.weight - before).square().mean().sqrt() < 0.1 * 0.25


def test_muon_trains_its_rest_like_torch_adamw():
    module = nn.LayerNorm(16)
    twin = copy.deepcopy(module)
    ours = optim.Muon(lr=1e-2, adamw_lr=1e-3, weight_decay=0.1).build(module)
    optim.set_lr(ours, 1e-2)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        x = torch.randn(4, 16)
        for net, optimizer in ((module, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(x).pow(3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(module.weight, twin.weight)


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_state_dict_continues_exactly(name):
    torch.manual_seed(1)
    straight, x = network(), torch.randn(5, 3, 8)
    halfway = None
    optimizer = optim.check({"name": name, "lr": 1e-2}, "optim").build(straight)
    for step in range(5):
        if step == 3:
            halfway = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
        _step(straight, optimizer, x[step])
    resumed = network()
    resumed.load_state_dict(halfway[0])
    optimizer = optim.check({"name": name, "lr": 1e-2}, "optim").build(resumed)
    optimizer.load_state_dict(halfway[1])
    for step in (3, 4):
        _step(resumed, optimizer, x[step])
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()
