"""Reductions: apply, compose, undo and their matrix form agree."""

from __future__ import annotations

import pytest
import torch

from vistok.compress.merge import merge_windows, window_similarity, windows
from vistok.compress.reduction import Reduction, from_dense, pack


def selection() -> Reduction:
    return pack(torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1]], dtype=torch.bool), 4)


def merging() -> Reduction:
    links = torch.tensor([[[0, 1], [0, -1], [1, -1], [-1, -1], [2, 1], [2, -1]]] * 2)
    weights = torch.tensor([[[0.5, 0.25], [0.5, 0], [0.5, 0], [0, 0], [1, 0.25], [1, 0]]] * 2)
    return Reduction(torch.tensor([[1, 2, 4]] * 2), torch.tensor([[2, 2, 2]] * 2), 6, links, weights)


def test_pack_puts_kept_tokens_right_and_fillers_left():
    found = selection()
    assert found.index.tolist()[0] == [0, 2, 3, 5]
    assert found.index[1, 2:].tolist() == [2, 5]
    assert found.valid.tolist() == [[True] * 4, [False, False, True, True]]


def test_pack_follows_a_key():
    found = pack(torch.tensor([[1, 1, 0, 1]], dtype=torch.bool), 3, torch.tensor([[2.0, 5.0, 0.0, 1.0]]))
    assert found.index.tolist() == [[3, 0, 1]]


@pytest.mark.parametrize("make", [selection, merging])
def test_the_matrix_applies_like_the_map(make):
    found = make()
    x = torch.randn(2, 6, 3)
    applied = found.apply(x).masked_fill(~found.valid.unsqueeze(-1), 0)
    torch.testing.assert_close(found.dense() @ x, applied)


def test_labels_and_unmerge_invert_a_selection():
    found, x = selection(), torch.randn(2, 6, 3)
    assert found.labels().tolist() == [[0, -1, 1, 2, -1, 3], [-1, -1, 2, -1, -1, 3]]
    back = found.unmerge(found.apply(x))
    kept = found.labels() >= 0
    assert torch.equal(back[kept], x[kept])
    assert not back[~kept].any()


def test_unmerge_gives_every_member_its_mean():
    links = torch.tensor([[[0], [0], [1], [1]]])
    found = Reduction(torch.tensor([[0, 2]]), torch.tensor([[2, 2]]), 4, links, torch.full((1, 4, 1), 0.5))
    x = torch.tensor([[[1.0], [3.0], [5.0], [9.0]]])
    assert found.unmerge(found.apply(x)).flatten().tolist() == [2, 2, 7, 7]


@pytest.mark.parametrize("first", [selection, merging])
@pytest.mark.parametrize("kind", ["select", "merge"])
def test_composing_equals_applying_one_after_the_other(first, kind):
    one = first()
    slots = one.index.shape[1]
    if kind == "select":
        two = pack(torch.tensor([[False] * (slots - 2) + [True] * 2] * 2), 2)
    else:
        links = torch.zeros(2, slots, 1, dtype=torch.int64)
        index = torch.full((2, 1), slots - 1)
        two = Reduction(index, torch.full((2, 1), slots), slots, links, torch.full((2, slots, 1), 1 / slots))
    x = torch.randn(2, 6, 3)
    step = one.apply(x).masked_fill(~one.valid.unsqueeze(-1), 0)
    both = one.compose(two)
    torch.testing.assert_close(both.apply(x), two.apply(step))
    assert torch.equal(both.index, one.index.gather(1, two.index))


def test_composing_refuses_other_lengths():
    with pytest.raises(ValueError, match="expects|maps 6 tokens and the first gives 4"):
        selection().compose(selection())


def test_gradients_flow_through_a_merge():
    x = torch.randn(2, 6, 3, requires_grad=True)
    merging().apply(x).sum().backward()
    assert x.grad is not None and x.grad[:, 4].abs().sum() > x.grad[:, 3].abs().sum() == 0


def worked_grid() -> torch.Tensor:
    """The hand-checkable 6 x 6 picture of the specification: window similarities 1, 4/9, 7/9, 0."""
    x = torch.zeros(36, 12)
    members = windows((6, 6), 3)
    x[members[0], 0] = 1
    x[members[1][:5], 0] = 1
    x[members[1][5:], 1] = 1
    x[members[2][:8], 1] = 1
    x[members[2][8], 2] = 1
    for j in range(9):
        x[members[3][j], 3 + j] = 1
    return x.unsqueeze(0)


def test_windows_lie_in_raster_order_and_borders_are_left_out():
    assert windows((6, 6), 3)[1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert windows((7, 8), 3).shape == (4, 9)
    assert windows((7, 8), 3).max() == 5 * 8 + 5


def test_window_similarity_of_the_worked_picture():
    found = window_similarity(worked_grid(), windows((6, 6), 3))
    torch.testing.assert_close(found, torch.tensor([[1.0, 32 / 72, 56 / 72, 0.0]]))


def test_merged_windows_lead_in_the_released_order():
    x = worked_grid()
    members = windows((6, 6), 3)
    found = merge_windows(window_similarity(x, members), members, 36, 2, raster=False)
    out = found.apply(x)[0]
    assert out.shape[0] == 20
    torch.testing.assert_close(out[0], torch.eye(12)[0])
    torch.testing.assert_close(out[1], (8 * torch.eye(12)[1] + torch.eye(12)[2]) / 9)
    assert found.sizes[0].tolist() == [9, 9] + [1] * 18
    assert found.index[0, 2:].tolist() == [*members[1].tolist(), *members[3].tolist()]


def test_merged_windows_take_their_middle_in_raster_order():
    x = worked_grid()
    members = windows((6, 6), 3)
    found = merge_windows(window_similarity(x, members), members, 36, 1, raster=True)
    assert found.index[0].tolist() == sorted(found.index[0].tolist())
    assert members[0][4] in found.index[0] and members[0][0] not in found.index[0]


def test_a_map_of_many_contributions_equals_its_matrix():
    matrix = torch.rand(12, 20).masked_fill(torch.rand(12, 20) < 0.2, 0.0)
    found = from_dense(torch.arange(12), matrix)
    assert found.links is not None and found.links.shape[2] > 8
    x = torch.randn(1, 20, 5)
    torch.testing.assert_close(found.dense()[0], matrix)
    torch.testing.assert_close(found.apply(x)[0], matrix @ x[0], atol=1e-6, rtol=0)
    assert found.apply(x.bfloat16()).dtype == torch.bfloat16
    empty = from_dense(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    assert empty.apply(torch.randn(1, 4, 3)).shape == (1, 0, 3)
