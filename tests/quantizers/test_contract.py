"""What holds for every quantizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import vistok
from tests.quantizers.zoo import DISCRETE, MASKABLE, ZOO, build, features
from vistok.quantizers.base import LOSS_TERMS


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("batch", [1, 3])
def test_result_has_the_shapes_of_the_contract(kind, batch):
    q = build(kind)
    out = q(features(q, batch))
    assert out.codes.shape == (batch, 16, q.dim)
    assert out.codes.dtype == torch.float32
    groups = len(q.vocab_sizes)
    if groups:
        n = q.num_ids(16)
        assert out.ids.shape == ((batch, n) if groups == 1 else (batch, n, groups))
        assert out.ids.dtype == torch.int64
        assert int(out.ids.min()) >= 0
        assert bool((q.grouped(out.ids) < torch.tensor(q.vocab_sizes)).all())
    else:
        assert out.ids is None
    assert set(out.losses) <= set(LOSS_TERMS)
    assert math.isclose(q.bits, sum(math.log2(v) for v in q.vocab_sizes))


@pytest.mark.parametrize("kind", ZOO)
def test_loss_is_the_weighted_sum_of_its_terms(kind):
    q = build(kind)
    out = q(features(q))
    expected = sum((q.weights[k] * v for k, v in out.losses.items()), start=torch.zeros(()))
    torch.testing.assert_close(out.loss, expected)
    assert set(out.losses) == {k for k, w in q.weights.items() if w} or kind.startswith("bsq")


@pytest.mark.parametrize("kind", DISCRETE)
def test_ids_decode_to_the_codes_of_evaluation(kind):
    q = build(kind).eval()
    out = q(features(q))
    torch.testing.assert_close(q.ids_to_codes(out.ids), out.codes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", DISCRETE)
def test_codes_to_ids_inverts_ids_to_codes(kind):
    q = build(kind).eval()
    ids = q(features(q, 3)).ids
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


@pytest.mark.parametrize("kind", ZOO)
def test_gradient_reaches_every_channel(kind):
    q = build(kind)
    z = features(q, scale=0.3).requires_grad_()
    out = q(z)
    ((out.codes * torch.randn_like(out.codes)).sum() + out.loss).backward()
    assert torch.isfinite(z.grad).all()
    assert bool((z.grad.abs().sum((0, 1)) > 0).all())


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_the_ids_of_the_same_features_in_float32(kind, dtype):
    q = build(kind).eval()
    z = features(q).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = q(z)
    full = q(z.float())
    assert half.codes.dtype == torch.float32
    assert torch.equal(half.codes, full.codes)
    if full.ids is not None:
        assert torch.equal(half.ids, full.ids)


@pytest.mark.parametrize("kind", ZOO)
def test_autocast_changes_nothing_in_training(kind):
    first, second = build(kind), build(kind)
    z = features(first)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    plain = first(z, generator=seeds[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = second(z, generator=seeds[1])
    assert torch.equal(plain.codes, cast.codes)
    assert torch.equal(plain.loss, cast.loss)


@pytest.mark.parametrize("kind", ZOO)
def test_evaluation_changes_no_state_and_repeats(kind):
    q = build(kind)
    q(features(q))
    q.eval()
    before = copy.deepcopy(q.state_dict())
    forwards = q.usage.forwards if q.usage else 0
    first, second = q(features(q, seed=5)), q(features(q, seed=5))
    assert torch.equal(first.codes, second.codes)
    assert all(torch.equal(before[k], v) for k, v in q.state_dict().items())
    assert (q.usage.forwards if q.usage else 0) == forwards


@pytest.mark.parametrize("kind", ZOO)
def test_state_dict_goes_round_strictly(kind):
    q = build(kind)
    q(features(q))
    other = build(kind, seed=7)
    other.load_state_dict(q.state_dict(), strict=True)
    z = features(q, seed=3)
    assert torch.equal(q.eval()(z).codes, other.eval()(z).codes)


@pytest.mark.parametrize("kind", ZOO)
def test_a_deep_copy_trains_on_its_own(kind):
    q = build(kind)
    q(features(q))
    twin = copy.deepcopy(q)
    before = copy.deepcopy(q.state_dict())
    optim = torch.optim.SGD([*twin.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (twin(features(q, seed=9)).loss + torch.zeros(1, requires_grad=True)).sum().backward()
    optim.step()
    assert all(torch.equal(before[k], v) for k, v in q.state_dict().items())


@pytest.mark.parametrize("kind", MASKABLE)
def test_padding_votes_for_no_loss_and_no_state(kind):
    first, second = build(kind), build(kind)
    z = features(first, 2, 16)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 9:] = False
    noisy = torch.where(mask.unsqueeze(-1), z, 37.0 * torch.randn_like(z))
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    clean_out, noisy_out = first(z, mask, generator=seeds[0]), second(noisy, mask, generator=seeds[1])
    for name, term in clean_out.losses.items():
        torch.testing.assert_close(noisy_out.losses[name], term)
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value)
    for name, figure in clean_out.stats.items():
        torch.testing.assert_close(noisy_out.stats[name], figure)


SHAPE_FREE = [k for k in MASKABLE if not k.startswith(("gaussian", "vq_stochastic", "residual_dropout", "binary"))]
"""Kinds that draw no random numbers whose count depends on the shape."""


@pytest.mark.parametrize("kind", SHAPE_FREE)
def test_a_mask_equals_leaving_the_padding_out(kind):
    first, second = build(kind), build(kind)
    z = features(first, 1, 16)
    mask = torch.arange(16).unsqueeze(0) < 11
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    masked, short = first(z, mask, generator=seeds[0]), second(z[:, :11], generator=seeds[1])
    for name, term in short.losses.items():
        torch.testing.assert_close(masked.losses[name], term)
    for key, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MASKABLE)
def test_a_batch_of_padding_gives_no_nan_and_changes_nothing(kind):
    q = build(kind)
    before = copy.deepcopy(q.state_dict())
    z = features(q).requires_grad_()
    out = q(z, torch.zeros(2, 16, dtype=torch.bool))
    assert abs(out.loss.item()) < 1e-4
    (out.loss + 0 * out.codes.sum()).backward()
    assert torch.isfinite(z.grad).all()
    assert all(torch.equal(before[k], v) for k, v in q.state_dict().items())


@pytest.mark.parametrize("kind", MASKABLE)
@pytest.mark.parametrize("shape", [(0, 16), (2, 0)])
def test_empty_input_gives_empty_output(kind, shape):
    q = build(kind)
    before = copy.deepcopy(q.state_dict())
    out = q(torch.zeros(*shape, q.in_dim))
    assert out.codes.shape == (*shape, q.dim)
    assert torch.isfinite(out.loss)
    assert all(torch.equal(before[k], v) for k, v in q.state_dict().items())
    assert out.ids is None or q.ids_to_codes(out.ids).shape == (*shape, q.dim)


@pytest.mark.parametrize("kind", MASKABLE)
def test_one_token_is_enough(kind):
    q = build(kind)
    out = q(features(q, 1, 1))
    assert out.codes.shape == (1, 1, q.dim)
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_any_scale_of_fp16_features_gives_finite_losses_and_gradients(kind, scale):
    q = build(kind)
    z = (features(q) * scale).clamp(-6e4, 6e4).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = q(z)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(out.codes).all()
    (out.loss + 0 * out.codes.sum()).backward()
    assert not torch.isnan(z.grad).any()


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_no_numbers_leave_no_trace(kind, bad):
    q = build(kind)
    z = features(q, 2, 16)
    z[0, 0] = z[1, 3] = bad
    out = q(z)
    assert all(torch.isfinite(v).all() for v in q.state_dict().values())
    assert out.ids is None or torch.equal(q.check_ids(out.ids), out.ids)


@pytest.mark.parametrize("kind", ZOO)
def test_a_module_in_half_precision_trains(kind):
    q = build(kind).to(torch.bfloat16)
    z = features(q).bfloat16().requires_grad_()
    out = q(z)
    (out.loss + out.codes.sum()).backward()
    assert out.codes.dtype == torch.float32
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("kind", ZOO)
def test_wrong_width_says_what_fits(kind):
    q = build(kind)
    with pytest.raises(ValueError, match=rf"takes features \(B, N, {q.in_dim}\) and got \(2, 16, {q.in_dim + 1}\)"):
        q(torch.zeros(2, 16, q.in_dim + 1))


@pytest.mark.parametrize("kind", DISCRETE)
def test_ids_outside_the_vocabulary_are_refused(kind):
    q = build(kind)
    ids = q.eval()(features(q)).ids.clone()
    ids[0, 0] = -1
    with pytest.raises(ValueError, match="and got values from -1"):
        q.ids_to_codes(ids)


@pytest.mark.parametrize("kind", DISCRETE)
def test_statistics_are_part_of_every_training_result(kind):
    q = build(kind)
    stats = q(features(q)).stats
    assert {"usage", "perplexity"} <= set(stats)
    assert 0 < float(stats["usage"]) <= 1
    assert not any(v.requires_grad for v in stats.values())


def test_mask_of_the_wrong_kind_is_refused():
    q = build("fsq")
    with pytest.raises(ValueError, match="mask says with True"):
        q(features(q), torch.ones(2, 16))


def test_grid_that_does_not_fit_is_refused():
    q = build("fsq")
    with pytest.raises(ValueError, match="grid \\(3, 3\\) has 9 positions"):
        q(features(q), grid=(3, 3))


def test_every_registered_kind_is_in_the_zoo():
    assert set(vistok.list("quantizer")) == {spec["name"] for spec in ZOO.values()}
