"""Pure parts of the methods before the language model: greedy choices, budgets over crops, correlations, clusters."""

from __future__ import annotations

import math

import pytest
import torch

from vistok.compress import greedy
from vistok.compress.correlation import outliers, redundant, sampling_keys, similar_counts
from vistok.compress.crops import cells, retention_ratios, share_out, valid_rectangle
from vistok.compress.greedy import determinantal, drop_duplicates, farthest_points, greatest_coverage
from vistok.compress.hash_attention import CodebookAttention
from vistok.compress.kmeans import choose_clusters, cluster_means, cluster_tokens, plus_plus, seeds, silhouette

CHOOSERS = {
    "farthest": farthest_points,
    "coverage": lambda x, k: greatest_coverage(x, torch.ones(x.shape[:2]), k),
    "determinantal": lambda x, k: determinantal(x, torch.ones(x.shape[:2]), k),
    "deduplicate": lambda x, k: drop_duplicates(x, torch.arange(x.shape[1]).expand(len(x), -1), k),
}


def tokens(batch: int = 3, n: int = 21, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CHOOSERS)
@pytest.mark.parametrize("count", [1, 5, 21])
def test_a_choice_has_no_duplicates_and_does_not_depend_on_the_batch(name, count):
    x = tokens()
    x[0, 3:9] = x[0, 2]  # exact duplicates
    x[1, 4] = 0  # a token without direction
    x[2] = x[2, :1]  # all the same
    found = CHOOSERS[name](x, count)
    assert found.shape == (3, count)
    for row, alone in zip(found, x):
        assert len(set(row.tolist())) == count
        assert torch.equal(CHOOSERS[name](alone[None], count)[0], row)


def test_farthest_points_without_the_matrix_are_the_same(monkeypatch):
    x = tokens(2, 50)
    expected = farthest_points(x, 12)
    monkeypatch.setattr(greedy, "LARGEST", 10)
    monkeypatch.setattr(greedy, "BLOCK", 7)
    assert torch.equal(farthest_points(x, 12), expected)
    assert torch.equal(farthest_points(x.bfloat16(), 12), farthest_points(x.bfloat16().float(), 12))


def test_farthest_points_are_those_of_the_definition():
    x = tokens(1, 15)
    unit = x[0] / x[0].norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    lonely = (distance + 9 * torch.eye(15)).amin(1).argmax()
    chosen = [int(lonely)]
    while len(chosen) < 6:
        nearest = distance[chosen].amin(0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    assert farthest_points(x, 6)[0].tolist() == chosen


def test_one_token_is_chosen():
    for choose in CHOOSERS.values():
        assert choose(tokens(2, 1), 1).tolist() == [[0], [0]]


def test_duplicates_go_first():
    x = torch.eye(6)[None].clone()
    x[0, 4] = x[0, 1] + 0.01
    assert set(drop_duplicates(x, torch.arange(6)[None], 5, step=1)[0].tolist()) == {0, 1, 2, 3, 5}


@pytest.mark.parametrize(
    ("total", "weights", "room", "expected"),
    [
        (10, [1, 1, 1], [10, 10, 10], [4, 3, 3]),
        (10, [5, 1, 1], [3, 10, 10], [3, 4, 3]),
        (7, [0, 0, 0], [2, 2, 9], [2, 2, 3]),
        (99, [1, 2], [3, 4], [3, 4]),
        (5, [1, 0], [3, 4], [3, 2]),
        (0, [1, 1], [3, 4], [0, 0]),
    ],
)
def test_shares_add_up_and_fit(total, weights, room, expected):
    assert share_out(total, weights, room) == expected


def test_nobody_goes_without_where_there_is_enough():
    assert share_out(5, [100, 1, 1], [9, 9, 0], least=1) == [4, 1, 0]
    assert share_out(1, [100, 1, 1], [9, 9, 0], least=1) == [1, 0, 0]


def test_retention_ratios_have_the_worked_values():
    def ratios(*sums: float, r: float) -> list[float]:
        return [round(v, 6) for v in retention_ratios(torch.tensor(sums), (2, 2), (2, 2), r).tolist()]

    assert ratios(10, 0, 0, 0, r=0.25) == [0.306342, 0.231219, 0.231219, 0.231219]
    assert ratios(12, 8, 4, 0, r=0.25) == [0.290770, 0.256724, 0.233902, 0.218604]
    assert ratios(30, 0, -10, 5, r=0.75) == [1.0, 0.594965, 0.574443, 0.616025]
    flat = retention_ratios(torch.zeros(25), (5, 5), (2, 2), 0.5)
    torch.testing.assert_close(flat, torch.full((4,), 0.5, dtype=torch.float64))


def test_cells_are_quadrants_and_strips_as_released():
    assert cells((2, 5), (1, 2)).tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    assert cells((4, 2), (2, 2), spatial=False).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="equal strips"):
        cells((3, 3), (2, 2), spatial=False)


@pytest.mark.parametrize(
    ("size", "layout", "expected"),
    [
        ((640, 480), (2, 2), (6, 42, 0, 48)),
        ((336, 900), (3, 1), (4, 68, 0, 24)),
        ((1000, 420), (1, 2), (2, 22, 0, 48)),
        ((672, 672), (2, 2), (0, 48, 0, 48)),
    ],
)
def test_the_picture_lies_where_the_card_says(size, layout, expected):
    assert valid_rectangle(size, layout, 24) == expected


def test_repetition_counts_others_only():
    keys = torch.tensor([[[1.0, 0], [1, 0.1], [1, -0.1], [0, 1]]])
    assert similar_counts(keys, 0.7).tolist() == [[2, 2, 2, 0]]
    assert redundant(keys, 0.7, 0.5).tolist() == [[True, True, True, False]]
    same = torch.ones(1, 300, 4)  # more than one block
    assert bool(redundant(same).all()) and similar_counts(same, 0.7).eq(299).all()
    assert not redundant(torch.eye(20)[None]).any()


def test_outliers_and_sampling_have_the_worked_values():
    values = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 30]) / 58
    assert outliers(values).nonzero().tolist() == [[7]]
    p, u = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.2, 0.6, 0.9, 0.7])
    expected = torch.tensor([-1.169032, -0.532246, 0.353247, -1.964802], dtype=torch.float64)
    torch.testing.assert_close(sampling_keys(p, u), expected, atol=1e-6, rtol=0)
    assert sampling_keys(p).argsort(descending=True).tolist() == [0, 1, 2, 3]


def test_clusters_of_a_batch_are_those_of_its_clips():
    x = torch.nn.functional.normalize(tokens(3, 60, 8), dim=-1)
    init = plus_plus(x, 5, seeds(3, 5, seed=1))
    together = cluster_tokens(x, init)
    for row in range(3):
        alone = cluster_tokens(x[row : row + 1], plus_plus(x[row : row + 1], 5, seeds(1, 5, seed=1)))
        assert torch.equal(together.labels[row], alone.labels[0])
        torch.testing.assert_close(together.centroids[row], alone.centroids[0], atol=1e-6, rtol=0)
    assert not torch.equal(init, plus_plus(x, 5, seeds(3, 5, seed=2)))
    assert int(together.counts.sum()) == 180


def test_more_clusters_than_tokens_gives_zero_rows():
    x = torch.nn.functional.normalize(tokens(1, 3, 4), dim=-1).repeat(1, 4, 1)  # three different tokens
    found = cluster_tokens(x, torch.tensor([[0, 1, 2, 3, 4]]))
    means, counts = cluster_means(x, found.labels, 5)
    assert counts[0].tolist() == [4, 4, 4, 0, 0]
    assert means[0, 3:].abs().max() == 0 and means.isfinite().all()
    torch.testing.assert_close(means[0, :3], x[0, :3])


def test_numbers_of_clusters_follow_their_rules():
    curve = torch.tensor([100.0, 60, 30, 28, 27, 26.9])
    assert choose_clusters(curve, 2, "elbow") == 4
    assert choose_clusters(curve, 12, "elbow_reference") == 12
    assert choose_clusters(curve, 2, "threshold", gain=0.05) == 5
    with pytest.raises(ValueError, match="at least three"):
        choose_clusters(curve[:2], 2, "elbow")
    with pytest.raises(ValueError, match="needs tokens"):
        choose_clusters(curve, 2, "silhouette")


def test_the_silhouette_depends_on_the_labels():
    centres = torch.nn.functional.normalize(tokens(1, 4, 16), dim=-1)
    x = torch.nn.functional.normalize(centres.repeat_interleave(8, 1) + 0.05 * tokens(1, 32, 16, seed=1), dim=-1)
    scores = [
        float(silhouette(x, cluster_tokens(x, torch.arange(k).mul(8).remainder(32).add(torch.arange(k) // 4)[None])))
        for k in (2, 3, 4, 6)
    ]
    assert scores.index(max(scores)) == 2 and all(math.isfinite(s) for s in scores)


def test_attention_over_the_codebook_does_not_depend_on_the_numbering():
    module = CodebookAttention(16, heads=2, grid=(2, 2, 2)).eval()
    labels = torch.randint(0, 5, (1, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    means = tokens(1, 5, 16)
    order = torch.tensor([3, 0, 4, 1, 2])
    back = order.argsort()
    torch.testing.assert_close(module(labels, means)[:, order], module(back[labels], means[:, order]))
