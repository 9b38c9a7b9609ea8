"""What is particular to the kinds with a table, and to wrappers of them."""

from __future__ import annotations

import math

import pytest
import torch

import vistok
from tests.quantizers.zoo import build, features
from vistok.quantizers.ema import draw_tokens
from vistok.quantizers.search import nearest, sample_nearby
from vistok.quantizers.vq import rotate_to


def test_nearest_equals_the_full_distance_table(monkeypatch):
    monkeypatch.setattr("vistok.quantizers.search.TILE", 7 * 16)
    monkeypatch.setattr("vistok.quantizers.search._CODES_PER_TILE", 16)
    queries, table = torch.randn(53, 5), torch.randn(101, 5)
    index, _ = nearest(queries, table)
    assert torch.equal(index, torch.cdist(queries.double(), table.double()).argmin(1))


def test_the_first_of_equal_codes_wins_also_across_tiles(monkeypatch):
    monkeypatch.setattr("vistok.quantizers.search._CODES_PER_TILE", 4)
    index, _ = nearest(torch.randn(6, 3), torch.ones(10, 3))
    assert index.tolist() == [0] * 6


def test_published_initialisation_is_uniform_within_one_over_c():
    table = vistok.create("quantizer", "vq", codebook_size=1000, dim=16).embedding.weight
    assert table.abs().max() <= 1e-3
    assert abs(table.std().item() - 1e-3 / math.sqrt(3)) < 2e-5


def test_published_weights():
    assert vistok.create("quantizer", "vq", codebook_size=8, dim=4).weights == {"codebook": 1.0, "commitment": 0.25}
    expected = {"entropy_sample": 0.1, "entropy_batch": -0.1, "commitment": 0.25}
    assert vistok.create("quantizer", "lfq", dim=8).weights == expected


def test_a_schedule_may_switch_the_entropy_on():
    q = build("vq")
    assert "entropy_batch" not in q(features(q)).losses
    q.weights["entropy_batch"] = -0.1
    assert "entropy_batch" in q(features(q)).losses


def test_rotation_of_opposite_vectors_gives_no_nan():
    z = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1e-30, 0.0]], requires_grad=True)
    q = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    out = rotate_to(z, q)
    out.sum().backward()
    assert torch.equal(out, q)
    assert torch.isfinite(z.grad).all()


def test_rotated_gradient_keeps_its_angle_to_the_code():
    z, q, g = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8), torch.randn(5, 8)
    (grad,) = torch.autograd.grad((rotate_to(z, q) * g).sum(), z)
    torch.testing.assert_close(
        torch.cosine_similarity(grad, z.detach(), dim=-1), torch.cosine_similarity(g, q, dim=-1), rtol=1e-4, atol=1e-5
    )


def test_sampled_ids_follow_the_softmax():
    query, table = torch.randn(1, 4), torch.randn(6, 4)
    ids = sample_nearby(query.expand(20000, 4), table, 1.0, torch.Generator().manual_seed(0))
    expected = (query @ table.T).softmax(-1)[0]
    torch.testing.assert_close(torch.bincount(ids, minlength=6) / 20000, expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("kind", ["vq_stochastic", "binary", "gaussian"])
def test_a_generator_replays_the_draws(kind):
    q = build(kind)
    draws = [q(features(q), generator=torch.Generator().manual_seed(s)).codes for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dead_codes_come_back_and_stay():
    q = build("vq_ema", codebook_size=32, dead_threshold=0.5, decay=0.8)
    with torch.no_grad():
        q.set_codebook(torch.cat([torch.randn(2, 8), torch.full((30, 8), 50.0)]))
    for t in range(30):
        out = q(features(q, 4, 64, seed=t))
    assert float(out.stats["usage"]) == 1
    assert len(out.ids.unique()) >= 28


def test_revival_resets_the_counters():
    q = build("vq_ema", codebook_size=4, dead_threshold=0.9, decay=0.5)
    q.set_codebook(torch.full((4, 8), 50.0) + torch.arange(4).unsqueeze(1))
    q(features(q))
    assert bool((q.cluster_size >= 0.9).all())
    torch.testing.assert_close(q.codebook[1:] * 0.9, q.codebook_sum[1:])


def test_kmeans_starts_once_and_is_remembered():
    q = build("vq_ema_kmeans")
    q(features(q))
    assert bool(q.ready)
    other = build("vq_ema_kmeans", seed=5)
    other.load_state_dict(q.state_dict())
    other.decay, other.dead_threshold = 0.9999999, 0
    before = other.codebook.clone()
    other(features(q, seed=9))
    torch.testing.assert_close(other.codebook, before, rtol=0, atol=1e-3)


def test_kmeans_waits_for_a_batch_that_counts():
    q = build("vq_ema_kmeans")
    q(features(q), torch.zeros(2, 16, dtype=torch.bool))
    assert not bool(q.ready)


def test_drawn_tokens_are_distinct_and_never_padding():
    tokens = torch.arange(100.0).unsqueeze(1)
    mask = torch.arange(100) % 3 == 0
    drawn = draw_tokens(tokens, mask, 34, torch.Generator().manual_seed(0)).squeeze(1).long()
    assert sorted(drawn.tolist()) == list(range(0, 100, 3))


def test_clustering_moves_unused_codes_to_features():
    q = build("cvq")
    far = torch.full((64, 8), 100.0)
    far[0] = 0
    q.embedding.weight.data = far
    z = features(q)
    q(z)
    moved = q.embedding.weight.detach()[1:]
    assert torch.cdist(moved, z.reshape(-1, 8)).min(1).values.max() < 0.5


@pytest.mark.parametrize("kind", ["cvq", "cvq_l2"])
def test_clustering_does_not_disturb_the_backward_pass(kind):
    first, second = build(kind), build(kind.replace("cvq", "vq"))
    z = features(first)
    for q in (first, second):
        q.embedding.weight.data = torch.randn(64, 8, generator=torch.Generator().manual_seed(4))
        q(z).loss.backward()
    torch.testing.assert_close(first.embedding.weight.grad, second.embedding.weight.grad)


def test_simvq_moves_every_code_with_one_step():
    q = build("simvq")
    before = q.codes.detach().clone()
    q(features(q)).loss.backward()
    with torch.no_grad():
        q.projection.weight -= 0.1 * q.projection.weight.grad
    assert bool(((q.codes - before).abs().sum(1) > 0).all())
    assert not q.frozen.requires_grad


def test_more_residual_levels_leave_less_error():
    errors = []
    for layers in (1, 2, 4):
        q = build("residual_lfq", layers=layers).eval()
        z = features(q, scale=0.7)
        errors.append((q(z).codes - z).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_dropped_levels_keep_valid_ids_and_their_state():
    q = build("residual_dropout")
    before = q.levels[2].codebook.clone()
    out = q.quantize_levels(features(q), _positions(q), None, active=1)
    torch.testing.assert_close(out.codes, q.levels[0].ids_to_codes(out.ids[..., 0]) * 0 + out.codes)
    assert int(out.ids.min()) >= 0
    assert torch.equal(q.levels[2].codebook, before)
    assert q.levels[2].training


def _positions(q):
    from vistok.quantizers.base import Positions

    return Positions(features(q), None, synced=False)


def test_dropped_levels_still_have_gradients_for_ddp():
    q = build("residual", quantize_dropout=True)
    out = q.quantize_levels(features(q), _positions(q), None, active=1)
    (out.loss + out.codes.sum()).backward()
    assert all(p.grad is not None for p in q.parameters())


def test_a_sum_that_is_none_of_the_levels_is_refused():
    q = build("residual")
    with pytest.raises(ValueError, match="no sum of codes"):
        q.codes_to_ids(torch.randn(1, 4, 8) * 10)


def test_multiscale_counts_ids_of_all_scales():
    q = build("multiscale")
    assert q.num_ids(16, (4, 4)) == 1 + 4 + 16
    assert q(features(q), grid=(4, 4)).ids.shape == (2, 21)


def test_multiscale_refuses_other_grids_and_masks():
    q = build("multiscale")
    with pytest.raises(ValueError, match="quantises a 4x4 grid and got 16 positions on a 2x8 grid"):
        q(features(q), grid=(2, 8))
    with pytest.raises(ValueError, match="takes no mask"):
        q(features(q), torch.ones(2, 16, dtype=torch.bool))


def test_gaussian_mode_is_the_default_of_evaluation():
    q = build("gaussian")
    z = features(q)
    assert not torch.equal(q.train()(z).codes, q.mode(z))
    assert torch.equal(q.eval()(z).codes, q.mode(z))
    q.sample = True
    assert not torch.equal(q(z).codes, q.mode(z))


def test_gaussian_has_no_ids():
    with pytest.raises(ValueError, match="no ids"):
        build("gaussian").ids_to_codes(torch.zeros(1, 2).long())
