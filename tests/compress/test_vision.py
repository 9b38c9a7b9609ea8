"""Reductions of vision towers as maps: pairs, shares, folds, schedules; free of any model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.plugins.hosts import picture
from vistok.compress.budget import Budget
from vistok.compress.match import bipartite, fold
from vistok.compress.methods.many_to_many import ManyToMany, share_out
from vistok.compress.methods.tome import ToMe, Turbo
from vistok.compress.reduction import Reduction, behind_prefix
from vistok.compress.vision import spread

ANCHORS = torch.tensor([[0, 5, 7, 11], [1, 2, 3, 8]])


def shared(x: Tensor, **config: float) -> Reduction:
    settings = {"links": 2, "temperature": 0.1, **config}
    return share_out(x, ANCHORS, torch.ones(x.shape[:2]), **settings)  # type: ignore[arg-type]


def test_a_pair_s_anchor_is_its_destination_and_only_the_rest_moves():
    x = picture(2, 17, 8)
    found = bipartite(x, 5, prefix=3, sizes=torch.rand(2, 17) + 0.5)
    torch.testing.assert_close(found.apply(x), found.dense() @ x)
    labels = found.labels()
    assert torch.equal(labels.gather(1, found.index), torch.arange(12).expand(2, -1))
    assert (labels.gather(1, found.moved) >= 3).all()
    assert torch.equal(found.index[:, :3], torch.arange(3).expand(2, -1))


def test_a_penalty_says_who_goes_first_and_never_where_to():
    x, value = picture(1, 20, 8), picture(1, 20, seed=1).abs()
    for merged in (3, 9):
        plain, ranked = bipartite(x, merged, prefix=1), bipartite(x, merged, prefix=1, penalty=value)
        partner = {s: plain.index[0, plain.labels()[0, s]].item() for s in plain.moved[0].tolist()}
        for s in ranked.moved[0].tolist():
            if s in partner:
                assert partner[s] == ranked.index[0, ranked.labels()[0, s]].item()
    assert not torch.equal(bipartite(x, 3, prefix=1).index, bipartite(x, 3, prefix=1, penalty=value).index)


def test_turbo_by_hand():
    """Section 10 of its description: six tokens, cosines as written, c = 30."""
    a, b = 0.9, 0.95
    even = torch.tensor([[0.0, 0, 1, 0], [a, 0, 0, (1 - a**2) ** 0.5], [0, b, 0, (1 - b**2) ** 0.5]])
    odd = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, -1.0]])
    x = torch.stack([even, odd], dim=1).flatten(0, 1).unsqueeze(0)  # class, 1, 2, 3, 4, 5
    value = torch.tensor([[0, 0, 0.02, 0, 0.03, 0]]) * 30
    found = bipartite(x, 1, prefix=1, penalty=value)
    assert found.index.tolist() == [[0, 4, 1, 3, 5]] and found.sizes.tolist() == [[1, 1, 2, 1, 1]]
    assert bipartite(x, 1, prefix=1).index.tolist() == [[0, 2, 1, 3, 5]]


def test_folding_again_and_again_puts_tokens_back_in_order():
    x = picture(2, 30, 8)
    found = fold(x, 24, prefix=1)
    assert found.index.shape == (2, 6)
    assert torch.equal(found.index.sort(dim=1).values, found.index)
    torch.testing.assert_close(found.sizes.sum(1), torch.full((2,), 30.0))
    torch.testing.assert_close(found.dense() @ x, found.apply(x))
    assert torch.equal(fold(x, 0).apply(x), x)
    assert fold(x, 100, prefix=1).index.shape == (2, 2)


def test_shares_conserve_mass_and_constants():
    x, mass = picture(2, 12, 8), torch.rand(2, 12) + 0.5
    found = share_out(x, ANCHORS, mass, links=3, temperature=0.2)
    torch.testing.assert_close(found.sizes.sum(1), mass.sum(1))
    matrix = found.dense()
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(2), torch.ones(2, 4))
    torch.testing.assert_close(found.apply(x), matrix @ x)
    torch.testing.assert_close(found.shares().sum(2), torch.ones(2, 12))


def test_no_temperature_is_the_mean_around_the_nearest_anchor():
    x = picture(2, 12, 8)
    found = share_out(x, ANCHORS, torch.ones(2, 12), links=1, temperature=0.0)
    for row in range(2):
        unit = F.normalize(x[row], dim=-1)
        nearest = (unit @ unit[ANCHORS[row]].T).argmax(1)
        nearest[ANCHORS[row]] = torch.arange(4)
        for slot in range(4):
            torch.testing.assert_close(found.apply(x)[row, slot], x[row, nearest == slot].mean(0))


def test_the_way_back_of_regions_is_exact():
    colours = F.normalize(picture(4, 8), dim=-1)
    region = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 3, 3, 2, 3])
    x = colours[region].unsqueeze(0)
    found = share_out(x, torch.tensor([[0, 2, 6, 8]]), torch.ones(1, 12), links=2, temperature=0.01)
    torch.testing.assert_close(found.unmerge(found.apply(x)), x, atol=1e-5, rtol=0)


def test_equal_tokens_are_shared_equally_and_their_order_does_not_matter():
    x = picture(1, 12, 8)
    x[0, 9] = x[0, 4]
    anchors, ones = torch.tensor([[0, 5, 7, 11]]), torch.ones(1, 12)
    found = share_out(x, anchors, ones, links=2, temperature=0.1)
    torch.testing.assert_close(found.shares()[0, 9], found.shares()[0, 4])
    order = torch.tensor([0, 9, 2, 3, 4, 5, 6, 7, 8, 1, 10, 11])
    other = share_out(x[:, order], anchors, ones, links=2, temperature=0.1)
    torch.testing.assert_close(other.apply(x[:, order]), found.apply(x))


def test_two_stages_make_one_map():
    x = picture(1, 12, 8)
    first = share_out(x, torch.tensor([[0, 2, 5, 7, 8, 11]]), torch.ones(1, 12), links=2, temperature=0.2)
    y = first.apply(x)
    second = share_out(y, torch.tensor([[0, 3, 5]]), first.sizes, links=2, temperature=0.2)
    both = first.compose(second)
    torch.testing.assert_close(both.apply(x), second.apply(y))
    torch.testing.assert_close(both.sizes, second.sizes)
    z = second.apply(y)
    torch.testing.assert_close(both.unmerge(z), first.unmerge(second.unmerge(z)))


def test_weak_links_are_cut_but_the_best():
    x = picture(2, 12, 8)
    found = shared(x, threshold=2.0)
    assert ((found.links >= 0).sum(2) == 1).all()
    torch.testing.assert_close(
        found.apply(x), share_out(x, ANCHORS, torch.ones(2, 12), links=1, temperature=0).apply(x)
    )


def test_more_is_kept_by_shares_than_by_pairs_and_by_pairs_than_by_dropping():
    """Relative projection error |X - W+ W X| / |X| on a smooth picture with noise, 64 tokens to 16."""
    axis = torch.linspace(0, 1, 8)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    waves = [torch.sin(6.3 * (a * x + b * y)) for a in range(4) for b in range(4)]
    tokens = torch.stack(waves, dim=-1).flatten(0, 1).unsqueeze(0) + 0.1 * picture(1, 64, 16)
    anchors = torch.arange(0, 64, 4).unsqueeze(0)

    def error(matrix: Tensor) -> float:
        kept = torch.linalg.pinv(matrix.double()) @ matrix.double() @ tokens.double()
        return float((tokens - kept).norm() / tokens.norm())

    ones = torch.ones(1, 64)
    soft = error(share_out(tokens, anchors, ones, links=4, temperature=0.1).dense())
    hard = error(share_out(tokens, anchors, ones, links=1, temperature=0).dense())
    dropped = error(Reduction(anchors, torch.ones(1, 16), 64).dense())
    assert hard < dropped and soft < dropped


def test_a_prefix_stays_in_front():
    x, sizes = picture(2, 14, 8), torch.ones(2, 14)
    found = behind_prefix(shared(x[:, 2:]), 2, sizes)
    torch.testing.assert_close(found.apply(x)[:, :2], x[:, :2])
    torch.testing.assert_close(found.apply(x)[:, 2:], shared(x[:, 2:]).apply(x[:, 2:]))
    rest = Reduction(ANCHORS, torch.ones(2, 4), 12)
    assert behind_prefix(rest, 2, sizes).index.tolist() == [[0, 1, 2, 7, 9, 13], [0, 1, 3, 4, 5, 10]]


def test_a_way_down_reaches_its_end_in_the_shape_of_the_schedule():
    def half(n: int) -> int:
        return n - n // 2

    assert spread(196, 100, [8] * 12, half) == [188, 180, 172, 164, 156, 148, 140, 132, 124, 116, 108, 100]
    falling = spread(196, 100, [12, 10, 8, 6, 4, 2, 0], half)
    steps = [a - b for a, b in zip([196, *falling], falling)]
    assert falling[-1] == 100 and steps == sorted(steps, reverse=True)
    for end in (5, 11, 40, 195):
        assert spread(196, end, [8] * 12, half)[-1] == end


def test_keep_takes_budgets_that_mean_something_in_a_tower():
    for keep in (49, 0.25, Budget(count=49), Budget(ratio=0.25), Budget(mean=49)):
        assert ToMe(keep=keep).left(12, 196)[-1] == 49
        assert ManyToMany(keep=keep).left(12, 196)[-1] == 49
    with pytest.raises(ValueError, match="language model's FLOPs"):
        ToMe(keep=Budget(flops=0.5))


def test_default_stages_of_many_to_many_scale_with_depth():
    assert ManyToMany().left(12, 196) == [196] * 3 + [127] * 3 + [83] * 3 + [54] * 3
    assert ManyToMany().stages_of(24) == (6, 12, 18)
    assert ManyToMany().stages_of(2) == (0, 1)


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="both say where merging ends"):
        Turbo(keep=0.5, threshold=40)
    with pytest.raises(ValueError, match="links=0"):
        ManyToMany(links=0)
    with pytest.raises(ValueError, match="shares of the patches fall"):
        ManyToMany(blocks=[1, 2], ratios=[0.5, 0.7])
