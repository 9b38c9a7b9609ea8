"""The closed forms and the tile-wise softmax against the direct formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.quantizers.zoo import build, features
from vistok.quantizers.base import Positions
from vistok.quantizers.bits import ids_to_bits
from vistok.quantizers.entropy import Logits, bits_entropies, pattern_probabilities, pattern_sum, softmax_entropies


def direct_lfq(z, bits, temperature, pooled=True, mask=None):
    """Softmax over all sign patterns in float64, as the paper writes it. z (B, N, G * bits)."""
    z = z.double().unflatten(-1, (-1, bits)).flatten(0, 1)  # (M, G, b)
    codes = ids_to_bits(torch.arange(2**bits), bits).double() * 2 - 1
    log_p = F.log_softmax(2 * z @ codes.T / temperature, dim=-1)
    if mask is not None:
        log_p = log_p[mask.flatten()]
    p = log_p.exp()
    sample = -(p * log_p).sum(-1).mean()
    mean = p.mean((0, 1)) if pooled else p.mean(0)
    return sample, -(mean * (mean + 1e-5).log()).sum(-1).mean()


def close(found, expected, loss_rtol=1e-6, grad_share=1e-5):
    for (value, grad), (want, want_grad) in zip(found, expected):
        assert abs(value.item() - want.item()) <= loss_rtol * abs(want.item())
        for g, w in zip(grad, want_grad):
            assert (g.double() - w).abs().max() <= grad_share * w.abs().max()


def with_gradients(values, inputs):
    return [(v, torch.autograd.grad(v, inputs, retain_graph=True)) for v in values]


@pytest.mark.parametrize(("groups", "bits"), [(1, 6), (1, 11), (4, 8), (3, 5)])
@pytest.mark.parametrize("pool", ["groups", "per_group"])
@pytest.mark.parametrize("masked", [False, True])
def test_lfq_entropies_are_those_of_the_softmax_over_all_codes(groups, bits, pool, masked):
    q = build("group_lfq", dim=groups * bits, groups=groups, entropy_pool=pool)
    z = features(q, 2, 20, scale=0.01)
    mask = torch.rand(2, 20) < 0.7 if masked else None
    z32, z64 = z.clone().requires_grad_(), z.double().requires_grad_()
    out = q(z32, mask)
    found = with_gradients([out.losses["entropy_sample"], out.losses["entropy_batch"]], [z32])
    expected = with_gradients(direct_lfq(z64, bits, 0.01, pool == "groups", mask), [z64])
    close(found, expected)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_lfq_entropies_hold_at_any_scale(scale):
    q = build("lfq", dim=8)
    z = features(q, 2, 64, scale=scale)
    z32, z64 = z.clone().requires_grad_(), z.double().requires_grad_()
    out = q(z32)
    found = with_gradients([out.losses["entropy_sample"], out.losses["entropy_batch"]], [z32])
    close(found, with_gradients(direct_lfq(z64, 8, 0.01), [z64]))


def test_token_chunks_add_up(monkeypatch):
    logit = torch.randn(2, 50, 8, requires_grad=True)
    weight = torch.rand(50)
    whole = pattern_sum(logit, weight)
    (grad,) = torch.autograd.grad(whole.square().sum(), logit)
    monkeypatch.setattr("vistok.quantizers.entropy.TILE", 256)
    parts = pattern_sum(logit, weight)
    (grad_parts,) = torch.autograd.grad(parts.square().sum(), logit)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(grad_parts, grad)


def test_patterns_are_little_endian():
    p = pattern_probabilities(torch.tensor([[9.0, -9.0, 9.0]]))
    assert int(p.argmax()) == 0b101


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("distances", [False, True])
def test_softmax_entropies_equal_the_direct_formula(distances, masked, monkeypatch):
    monkeypatch.setattr("vistok.quantizers.search.TILE", 7 * 16)
    monkeypatch.setattr("vistok.quantizers.search._CODES_PER_TILE", 16)
    z, table = torch.randn(2, 25, 6), torch.randn(100, 6)
    mask = torch.rand(2, 25) < 0.6 if masked else None
    scale = 2.0
    z32, t32 = z.clone().requires_grad_(), table.clone().requires_grad_()
    bias = -0.5 * scale * t32.square().sum(-1) if distances else None
    terms = softmax_entropies(z32, t32, Positions(z32, mask, synced=False), scale=scale, bias=bias)
    found = with_gradients([terms["entropy_sample"], terms["entropy_batch"]], [z32, t32])

    z64, t64 = z.double().requires_grad_(), table.double().requires_grad_()
    flat = z64.flatten(0, 1) if mask is None else z64.flatten(0, 1)[mask.flatten()]
    logit = scale * flat @ t64.T - (0.5 * scale * t64.square().sum(-1) if distances else 0)
    log_p = logit.log_softmax(-1)
    mean = log_p.exp().mean(0)
    direct = [-(log_p.exp() * log_p).sum(-1).mean(), -(mean * (mean + 1e-5).log()).sum()]
    close(found, with_gradients(direct, [z64, t64]))


@pytest.mark.parametrize("scale", [20.0, 200.0, 2e4])
def test_softmax_entropies_hold_where_exp_underflows(scale):
    z, table = torch.randn(1, 40, 6), torch.randn(300, 6)
    terms = softmax_entropies(z, table, Positions(z, None, synced=False), scale=scale)
    log_p = (scale * z[0].double() @ table.double().T).log_softmax(-1)
    mean = log_p.exp().mean(0)
    expected = [-(log_p.exp() * log_p).sum(-1).mean(), -(mean * (mean + 1e-5).log()).sum()]
    for found, want in zip(terms.values(), expected):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-6)


def test_no_probability_underflows():
    z, table = torch.randn(40, 6), torch.randn(300, 6)
    logits = Logits(z, table, scale=1e4)
    log_q = logits.log_softmax(slice(0, 40), slice(0, 300), logits.best()[1])
    assert float(log_q.exp().min()) >= torch.finfo(torch.float32).tiny


def test_index_backpropagation_equals_the_one_hot_formula(monkeypatch):
    monkeypatch.setattr("vistok.quantizers.search.TILE", 7 * 16)
    monkeypatch.setattr("vistok.quantizers.search._CODES_PER_TILE", 16)
    q = build("ibq", codebook_size=100, dim=6, entropy_weight=0.0)
    z = features(q, 2, 25)
    z32 = z.clone().requires_grad_()
    out = q(z32)
    cotangent = torch.randn_like(out.codes)
    found = [torch.autograd.grad((out.codes * cotangent).sum(), [z32, q.embedding.weight], retain_graph=True)]
    found.append(torch.autograd.grad(out.loss, [z32, q.embedding.weight]))

    z64, e64 = z.double().requires_grad_(), q.embedding.weight.detach().double().requires_grad_()
    logit = z64 @ e64.T
    p, hard = logit.softmax(-1), F.one_hot(logit.argmax(-1), 100).double()
    codes, plain = (hard - p.detach() + p) @ e64, hard @ e64
    loss = (codes - z64).square().mean() + (plain.detach() - z64).square().mean()
    loss = loss + 0.25 * (plain - z64.detach()).square().mean()
    expected = [torch.autograd.grad((codes * cotangent).sum(), [z64, e64], retain_graph=True)]
    expected.append(torch.autograd.grad(loss, [z64, e64]))
    assert torch.equal(out.ids, logit.argmax(-1))
    for ours, theirs in zip(found, expected):
        for g, w in zip(ours, theirs):
            assert (g.double() - w).abs().max() <= 1e-5 * w.abs().max()


def test_batch_entropy_is_largest_for_even_use():
    even = torch.tensor([[-9.0, 9.0], [9.0, -9.0], [9.0, 9.0], [-9.0, -9.0]]).reshape(1, 4, 1, 2) * 10
    constant = torch.full((1, 4, 1, 2), 90.0)
    entropies = []
    for logit in (even, constant):
        entropies.append(bits_entropies(logit, Positions(logit, None, synced=False), pooled=True)["entropy_batch"])
    torch.testing.assert_close(entropies[0], torch.tensor(4.0).log(), rtol=1e-4, atol=0)
    assert abs(entropies[1].item()) < 1e-4


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0, 100.0])
def test_no_nan_at_any_temperature_in_fp16(temperature):
    for kind in ("lfq", "group_lfq"):
        q = build(kind, temperature=temperature)
        z = (features(q) * 100).half().requires_grad_()
        q(z).loss.backward()
        assert not torch.isnan(z.grad).any()
