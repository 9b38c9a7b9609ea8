"""Selections, scores, budgets and grids: hand-worked values and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.compress import door
from vistok.compress.budget import Budget, HostShape, default_layers, rescale, solve_count, tokens_per_layer
from vistok.compress.cluster import density_peaks
from vistok.compress.grid import fit_grid
from vistok.compress.method import FeatureMethod
from vistok.compress.methods.fastv import FastV
from vistok.compress.methods.mustdrop import MustDrop
from vistok.compress.methods.pyramiddrop import PyramidDrop
from vistok.compress.methods.sparsevlm import rater_weights
from vistok.compress.methods.transprune import TransPrune
from vistok.compress.score import rotary_gravity, row_probabilities, transition
from vistok.compress.select import hash_scores, segment_mean, top_in_segments
from vistok.compress.signals import Level, Signals
from vistok.compress.view import View

LLAVA = HostShape(depth=32, width=4096, mlp=11008, heads=32, kv_heads=32, head_dim=128)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31), st.integers(0, 6))
def test_the_best_of_every_segment_stay(images, seed, quota):
    generator = torch.Generator().manual_seed(seed)
    segment = torch.randint(-1, images, (2, 30), generator=generator)
    scores = torch.rand(2, 30, generator=generator)
    found = top_in_segments(scores, segment, [[quota] * images] * 2)
    for b in range(2):
        for s in range(images):
            mine = segment[b] == s
            kept, gone = scores[b][mine & found[b]], scores[b][mine & ~found[b]]
            assert len(kept) == min(quota, int(mine.sum()))
            assert not len(kept) or not len(gone) or kept.min() >= gone.max()
    assert not (found & (segment < 0)).any()


def test_ties_go_to_the_lower_position():
    found = top_in_segments(torch.ones(1, 6), torch.tensor([[0, 0, 1, 1, 1, -1]]), [[1, 2]])
    assert found.tolist() == [[True, False, True, True, False, False]]


def test_the_hash_ranks_by_position_and_seed_alone():
    place = torch.arange(1000)
    one = hash_scores(place, 0)
    assert torch.equal(hash_scores(place.flip(0), 0), one.flip(0))
    assert len(torch.unique(one)) == 1000 and abs(float(one.mean()) - 0.5) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([one, hash_scores(place, 1)]))[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1])) < 0.1


def test_segment_means_stay_inside_their_segment():
    found = segment_mean(torch.tensor([[1.0, 3.0, 10.0, 7.0]]), torch.tensor([[0, 0, 1, -1]]), 2)
    assert found.tolist() == [[2, 2, 10, 0]]


def test_rows_of_grouped_heads_equal_full_attention():
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    visible = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 6, 6)
    full = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    found = row_probabilities(q[:, :, 2:4], k, scale=0.3, visible=visible[:, 2:4])
    torch.testing.assert_close(found, full[:, :, 2:4])


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("signed", [0.244728, 0.045015, 0.665241]), ("abs", [0.576117, 0.105971, 0.211942])],
)
def test_transition_of_three_worked_tokens(direction, expected):
    before = torch.tensor([[[1.0, 0], [0, 2], [3, 4]]])
    after = torch.tensor([[[0.0, 1], [0, 1], [-3, -4]]])
    found = transition(before, after, torch.ones(1, 3, dtype=torch.bool), direction)
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-6, rtol=0)


def test_transition_of_a_padded_row_is_that_of_the_row():
    before, after = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    valid = torch.tensor([[False, False, True, True, True]])
    alone = transition(before[:, 2:], after[:, 2:], valid[:, 2:])
    torch.testing.assert_close(transition(before, after, valid)[:, 2:], alone)


@pytest.mark.parametrize(
    ("head_dim", "distance", "expected"),
    [(128, 0, 11.3137), (128, 10, 7.5696), (128, 600, 2.3493), (64, 1, 7.7292), (64, 300, 2.3357), (64, 725, 0.8)],
)
def test_rotary_gravity_of_worked_distances(head_dim, distance, expected):
    angles = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    found = rotary_gravity(angles, torch.tensor([distance]))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=2e-4, rtol=0)


def test_raters_of_the_worked_example():
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [2, 0], [0, 1], [-1, 0]]])
    image = torch.tensor([[True, True, True, False, False, False]])
    found = rater_weights(x, x, image, ~image)[0, 3:]
    torch.testing.assert_close(found, torch.tensor([0.633177, 0.268169, 0.098654]), atol=1e-6, rtol=0)


def test_clusters_of_the_worked_points():
    points = torch.tensor([[[0.0, 0], [0, 0.2], [0.1, 0.05], [5, 5], [5, 5.3], [9, 0]]])
    label, centres = density_peaks(points, torch.ones(1, 6, dtype=torch.bool), torch.tensor([3]))
    assert centres.tolist() == [[2, 1, 0]]
    merged = [points[0][label[0] == c].mean(0) for c in range(3)]
    expected = torch.tensor([[4.55, 0.025], [3.3333, 3.5], [0, 0]])
    torch.testing.assert_close(torch.stack(merged), expected, atol=1e-4, rtol=0)


def test_clusters_of_a_padded_row_are_those_of_the_row():
    x = torch.randn(1, 9, 4)
    member = torch.tensor([[False, True, True, False, True, True, True, True, False]])
    label, _ = density_peaks(x, member, torch.tensor([2]))
    alone, _ = density_peaks(x[:, member[0]], torch.ones(1, 6, dtype=torch.bool), torch.tensor([2]))
    assert torch.equal(label[member], alone[0])
    assert (label[~member] == -1).all()


def must_drop_view(keys: list[bool]) -> View:
    rows = torch.tensor([[[0.30, 0.05, 0.02, 0.01], [0.10, 0.06, 0.02, 0.30]]])
    zeros = torch.zeros(1, 4, dtype=torch.int64)
    return View(
        index=torch.arange(4).unsqueeze(0),
        valid=torch.ones(1, 4, dtype=torch.bool),
        segment=zeros,
        place=zeros,
        protect=torch.tensor([keys]),
        sizes=[[4]],
        counts=[[4]],
        texts=[0],
        attention=rows.unsqueeze(1),
        row_valid=torch.ones(1, 2, dtype=torch.bool),
    )


@pytest.mark.parametrize(("keys", "kept"), [([False] * 4, [0, 3]), ([False, False, True, False], [0, 2, 3])])
def test_the_dual_filter_of_the_worked_example(keys, kept):
    method = MustDrop(gamma_global=0.2, gamma_individual=0.1)
    decision = method.reduce(must_drop_view(keys), LLAVA)
    assert decision.reduction.index[0].tolist() == kept
    assert decision.counts == [[len(kept)]]


@pytest.mark.parametrize(
    ("method", "mean", "tera"),
    [
        (FastV(), 306.0, 2.007),
        (FastV(ratios=[0.25]), 171.0, 1.118),
        (PyramidDrop(), 270.0, 1.777),
        (TransPrune(), 236.25, 1.5572),
        (TransPrune(ratios=[0.65, 0.25, 0.05]), None, 1.1901),
    ],
)
def test_schedules_cost_what_the_tables_say(method, mean, tera):
    entering = tokens_per_layer(576, method.cut_layers(32), method.quota(576, LLAVA), 32)
    assert mean is None or sum(entering) / 32 == mean
    flops = sum(LLAVA.layer_flops(n) for n in entering) / 2  # the papers count a multiply-add once
    assert flops / 1e12 == pytest.approx(tera, abs=6e-4)


@pytest.mark.parametrize(("mean", "count"), [(192, 166), (128, 98), (64, 29)])
def test_a_mean_budget_of_fastv_is_met_from_below(mean, count):
    assert FastV(keep=Budget(mean=mean)).quota(576, LLAVA) == [count]


@pytest.mark.parametrize("method", [FastV, PyramidDrop, TransPrune])
@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
def test_a_flops_budget_is_met_from_below(method, share):
    built = method(keep=Budget(flops=share))
    full = 32 * LLAVA.layer_flops(576)

    def cost(quota: list[int]) -> float:
        return sum(LLAVA.layer_flops(n) for n in tokens_per_layer(576, built.cut_layers(32), quota, 32)) / full

    quota = built.quota(576, LLAVA)
    assert share - 0.01 < cost(quota) <= share


def test_a_budget_that_cannot_be_met_is_refused():
    with pytest.raises(ValueError, match="cannot be met"):
        PyramidDrop(keep=Budget(mean=10)).quota(576, LLAVA)


@pytest.mark.parametrize("given", [{}, {"count": 3, "ratio": 0.5}, {"ratio": 1.5}, {"count": 0}])
def test_budgets_that_mean_nothing_are_refused(given):
    with pytest.raises(ValueError, match="Budget"):
        Budget(**given)


def test_a_count_and_a_ratio_need_no_schedule():
    assert solve_count(Budget(count=700), 576, LLAVA, lambda share: []) == 576
    assert solve_count(Budget(ratio=0.5), 575, LLAVA, lambda share: []) == 288


@pytest.mark.parametrize("keep", [0.05, 0.125, 0.3, 1.0])
def test_rescaled_schedules_end_at_keep_and_fall(keep):
    found = rescale((0.5, 0.25, 0.125), keep)
    assert found[-1] == pytest.approx(keep) and list(found) == sorted(found, reverse=True)
    assert keep != 0.125 or found == pytest.approx((0.5, 0.25, 0.125))


@pytest.mark.parametrize("depth", range(5, 41))
def test_default_layers_fit_every_depth(depth):
    for published in ((2,), (8, 16, 24), (7, 9, 12), (3, 7, 11, 15)):
        found = default_layers(published, depth)
        assert len(set(found)) == len(published) and list(found) == sorted(found)
        assert found[0] >= 1 and found[-1] <= depth - 1
    assert default_layers((8, 16, 24), 32) == (8, 16, 24)


def test_a_model_too_shallow_for_a_schedule_is_refused():
    with pytest.raises(ValueError, match="needs 5 layers"):
        default_layers((3, 7, 11, 15), 4)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 1700))
def test_smaller_grids_fit_their_count(h, w, count):
    small = fit_grid((h, w), count)
    assert 1 <= small[0] <= h and 1 <= small[1] <= w and small[0] * small[1] <= max(count, 1)
    assert count < h * w or small == (h, w)


def test_frames_stay_as_many_as_possible():
    assert fit_grid((4, 6, 6), 36) == (4, 3, 3)
    assert fit_grid((4, 6, 6), 3) == (3, 1, 1)


@pytest.mark.parametrize("budget", [0.25, 100, Budget(count=9), Budget(ratio=0.5), Budget(mean=33.3)])
def test_the_door_keeps_what_it_promised(budget):
    features = torch.randn(144, 8)
    assert "random_features" in door.methods() and "pool" not in door.methods()
    for method in door.methods():
        index = door.keep(features, budget, method=method, grid=(12, 12))
        assert len(index) == door.count(144, budget)
        assert torch.equal(index, index.unique())
        assert torch.equal(index, door.keep(features, budget, method=method, grid=(12, 12)))


@pytest.mark.parametrize("budget", [0.3, 37, 144])
def test_the_door_takes_signals_and_decides_per_picture(budget):
    generator = torch.Generator().manual_seed(3)

    def level() -> Level:
        row = torch.rand(144, generator=generator).softmax(0)
        return Level(cls_row=row, keys=torch.randn(144, 2, 4, generator=generator))

    levels = (level(), level())
    seen = Signals(
        features=torch.randn(144, 8, generator=generator),
        grid=(12, 12),
        cls_row=levels[1].cls_row,
        keys=levels[1].keys,
        levels=levels,
        text=torch.randn(5, 8, generator=generator),
    )
    names = door.methods(signals=True)
    assert {"visionzip", "prumerge", "hired", "globalcom2", "token_corr", "divprune", "cdpruner"} <= set(names)
    for method in names:
        index = door.keep(seen, budget, method=method)
        assert len(index) == door.count(144, budget) and torch.equal(index, index.unique())
        assert torch.equal(index, door.keep(seen, budget, method=method))


def test_the_door_says_which_signal_is_missing():
    with pytest.raises(ValueError, match="cls_row"):
        door.keep(torch.randn(16, 4), 4, method="fastervlm")
    with pytest.raises(ValueError, match="keys"):
        door.keep(Signals(features=torch.randn(16, 4), grid=None, cls_row=torch.rand(16)), 8, method="visionzip")


def test_the_door_refuses_what_needs_more():
    with pytest.raises(ValueError, match="needs more than features or merges"):
        door.keep(torch.randn(16, 4), 4, method="pool")
    with pytest.raises(ValueError, match="sizes of the language model"):
        door.count(16, Budget(flops=0.5))


def test_feature_budgets_are_clipped_to_the_picture():
    assert [FeatureMethod(keep=k).count(16) for k in (40, 0.001, 1.0, 0.5)] == [16, 1, 16, 8]
