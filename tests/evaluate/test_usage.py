"""Code usage figures against direct computation."""

from __future__ import annotations

import math

import pytest
import torch

from vistok.evaluate.usage import CodebookUsage


def test_usage_of_known_ids():
    usage = CodebookUsage((8,))
    usage.update(torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]]))
    found = usage.compute()
    assert found["usage"] == 0.5
    assert found["dead"] == 4
    assert found["entropy"] == pytest.approx(2.0)
    assert found["perplexity"] == pytest.approx(4.0)
    assert found["bits"] == 3.0
    assert (found["tokens"], found["tokens_per_picture"]) == (8, 4.0)


def test_counts_equal_bincount_over_several_batches():
    ids = torch.randint(0, 50, (6, 40))
    usage = CodebookUsage((64,))
    for part in ids.split(4):
        usage.update(part)
    assert torch.equal(usage.counts[0], torch.bincount(ids.flatten(), minlength=64))


def test_padding_does_not_count():
    usage = CodebookUsage((4,))
    usage.update(torch.tensor([[1, 0], [1, 0]]), torch.tensor([[True, False], [True, False]]))
    assert usage.compute()["usage"] == 0.25
    assert usage.compute()["entropy"] == 0.0


def test_bits_of_groups_add_up():
    usage = CodebookUsage((4, 16))
    usage.update(torch.stack((torch.arange(4).repeat(4), torch.arange(16)), -1)[None])
    found = usage.compute()
    assert found["bits"] == 6.0
    assert found["entropy"] == pytest.approx(6.0)
    assert found["efficiency"] == pytest.approx(1.0)
    assert found["perplexity"] == pytest.approx((4 + 16) / 2)


def test_entropy_matches_the_formula_on_skewed_ids():
    usage = CodebookUsage((3,))
    usage.update(torch.tensor([[0] * 6 + [1] * 3 + [2]]))
    expected = -sum(p * math.log2(p) for p in (0.6, 0.3, 0.1))
    assert usage.compute()["entropy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[9]]), r"9\.\.9"),
        (torch.tensor([[-1]]), r"-1\.\.-1"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), "2"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        CodebookUsage((4,)).update(ids)


def test_continuous_latents_have_no_usage():
    with pytest.raises(ValueError, match="Continuous"):
        CodebookUsage(())


def test_nothing_seen_is_an_error():
    with pytest.raises(ValueError, match="No ids"):
        CodebookUsage((4,)).compute()
