"""Sliding-window statistics of ids."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.quantizers.zoo import build, features
from vistok.quantizers.usage import UsageTracker


def window_of(batches, window):
    return torch.cat([b.reshape(-1) for b in batches])[-window:]


@pytest.mark.parametrize("window", [7, 64, 1000])
def test_counts_are_the_bincount_of_the_window(window):
    tracker = UsageTracker((16,), window=window)
    batches = [torch.randint(16, (2, 5 + t)) for t in range(12)]
    for ids in batches:
        tracker.update(ids)
    expected = torch.bincount(window_of(batches, window), minlength=16)
    assert sorted(tracker.counts()[0].tolist()) == sorted(c for c in expected.tolist() if c or window >= 16)


@pytest.mark.parametrize(("vocab", "window"), [((16,), 50), ((8, 16), 33), ((4, 4, 4), 1000), ((2**23,), 40)])
def test_counts_follow_the_window_through_every_step(vocab, window):
    tracker, rows = UsageTracker(vocab, window=window), torch.zeros(0, len(vocab), dtype=torch.int64)
    for t in range(40):
        ids = torch.stack([torch.randint(v, (2, t % 19)) for v in vocab], dim=-1)
        mask = torch.rand(ids.shape[:2]) > 0.3
        tracker.update(tracker_shape(ids), mask)
        rows = torch.cat([rows, ids.masked_fill(~mask.unsqueeze(-1), -1).flatten(0, 1)])[-window:]
        for found, column in zip(tracker.counts(), rows.T):
            expected = torch.unique(column[column >= 0], return_counts=True)[1]
            assert torch.equal(found[found > 0], expected)


def tracker_shape(ids):
    return ids.squeeze(-1) if ids.shape[-1] == 1 else ids


def test_one_step_larger_than_the_window_is_fine():
    tracker = UsageTracker((4,), window=8)
    ids = torch.arange(100) % 4
    assert float(tracker.update(ids.unsqueeze(0))["usage"]) == 1
    assert int(tracker.counts()[0].sum()) == 8


def test_usage_and_perplexity_of_a_known_distribution():
    stats = UsageTracker((8,)).update(torch.tensor([[0, 1, 2, 3] * 5]))
    assert float(stats["usage"]) == 0.5
    torch.testing.assert_close(stats["perplexity"], torch.tensor(4.0))


def test_padding_is_not_counted():
    ids = torch.tensor([[0, 1, 2, 3]])
    stats = UsageTracker((4,)).update(ids, torch.tensor([[True, True, False, False]]))
    assert float(stats["usage"]) == 0.5


def test_groups_are_averaged():
    ids = torch.stack([torch.zeros(1, 8).long(), torch.arange(8).unsqueeze(0)], dim=-1)
    stats = UsageTracker((8, 8)).update(ids)
    torch.testing.assert_close(stats["usage"], torch.tensor((1 / 8 + 1) / 2))


def test_bit_balance_finds_a_constant_bit():
    even = torch.arange(16).unsqueeze(0)
    assert float(UsageTracker((16,), bitwise=True).update(even)["bit_balance"]) == 1
    assert float(UsageTracker((16,), bitwise=True).update(even & 0b1011)["bit_balance"]) == 0


@pytest.mark.parametrize("kind", ["lfq", "group_lfq", "bsq", "binary_64"])
def test_bit_quantizers_report_their_bit_balance(kind):
    q = build(kind)
    assert 0 < float(q(features(q, 4, 64)).stats["bit_balance"]) <= 1


def test_dead_codes_grow_older():
    tracker = UsageTracker((4,), every=5)
    for _ in range(20):
        stats = tracker.update(torch.tensor([[0, 1, 2, 3]]))
    assert float(stats["dead_age"]) == 0
    for _ in range(15):
        stats = tracker.update(torch.tensor([[0, 1, 2]]))
    assert float(stats["dead_age"]) == 15
    assert tracker.ages()[0].tolist() == [0, 0, 0, 15]


def test_huge_vocabularies_are_counted_without_a_table():
    ids = torch.tensor([[2**62, 2**62, 5, 7]])
    stats = UsageTracker((2**63,)).update(ids)
    torch.testing.assert_close(stats["perplexity"], torch.tensor(2 * 2**0.5))
    assert "usage" not in stats


def test_statistics_leave_no_trace_in_state_or_parameters():
    q, fresh = build("vq"), build("vq")
    q(features(q))
    assert q.state_dict().keys() == fresh.state_dict().keys()
    assert [n for n, _ in q.named_buffers()] == []
    assert len(list(q.parameters())) == 1


def test_statistics_survive_a_deep_copy_without_being_shared():
    q = build("vq")
    q(features(q))
    twin = copy.deepcopy(q)
    twin(features(q))
    assert (q.usage.forwards, twin.usage.forwards) == (1, 2)


def test_tracking_can_be_switched_off():
    q = build("vq")
    q.usage = None
    assert q(features(q)).stats == {}


def test_reset_forgets():
    q = build("vq")
    q(features(q))
    q.usage.reset()
    assert q.usage.forwards == 0
    assert int(q.usage.counts()[0].sum()) == 0
