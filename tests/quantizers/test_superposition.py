"""Ids of multi-scale codes: which rows of the table add up to them."""

from __future__ import annotations

import pytest
import torch

from tests.quantizers.zoo import build, features


def random_ids(q, batch: int, seed: int = 0) -> torch.Tensor:
    shape = (batch, sum(p * p for p in q.scales))
    return torch.randint(q.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        {"scales": [4], "blend": 0.0},
        {"scales": [1]},
        {"codebook_size": 1, "scales": [1, 2]},
        {"codebook_size": 16, "dim": 4},
        {"codebook_size": 1000, "dim": 2, "scales": [4]},
        {"codebook_size": 5, "dim": 8},
        {"shared_blends": 1, "blend": 0.2},
        {"cosine": True},
        {"codebook_size": 256, "dim": 16, "scales": [1, 2, 3, 4, 6, 8]},
    ],
)
def test_random_ids_come_back(changes):
    q = build("multiscale", **changes).eval()
    ids = random_ids(q, 3)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


def test_ids_of_features_come_back_in_every_picture():
    q = build("multiscale").eval()
    ids = q(features(q, 20)).ids
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


def test_the_first_of_equal_rows_comes_back():
    q = build("multiscale").eval()
    with torch.no_grad():
        q.embedding.weight[40:] = q.embedding.weight[:24]
    ids = random_ids(q, 2)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), torch.where(ids >= 40, ids - 40, ids))


def test_an_untrained_table_is_small_beside_the_bias():
    q = build("multiscale").eval()
    with torch.no_grad():
        q.embedding.weight.uniform_(-1 / 64, 1 / 64)
    ids = random_ids(q, 5)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


@pytest.mark.parametrize("spread", [1 / 64, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01, 0.0])
def test_ids_of_faint_features_come_back(scale, spread):
    """Beside the bias of phi such features, at 0 a flat picture, choose a few rows again and again."""
    q = build("multiscale", seed=1).eval()
    with torch.no_grad():
        q.embedding.weight.uniform_(-spread, spread)
    ids = q(features(q, 8, scale=scale)).ids
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


@pytest.mark.parametrize("codebook_size, dim", [(64, 8), (16, 4)])
def test_scales_that_use_one_row_each_come_back(codebook_size, dim):
    q = build("multiscale", codebook_size=codebook_size, dim=dim).eval()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(codebook_size, (8, 1), generator=generator).expand(-1, p * p) for p in q.scales]
    ids = torch.cat(rows, dim=1)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


def test_of_two_lists_with_one_sum_one_comes_back():
    """Scales with the same phi, one row in all of each, can be exchanged."""
    q = build("multiscale", shared_blends=1, seed=1).eval()
    first, second = random_ids(q, 1, seed=1), random_ids(q, 1, seed=1)
    first[:, :1], first[:, 1:5] = 3, 5
    second[:, :1], second[:, 1:5] = 5, 3
    codes = q.ids_to_codes(first)
    torch.testing.assert_close(q.ids_to_codes(second), codes)
    found = q.codes_to_ids(codes)
    assert torch.equal(found, first) or torch.equal(found, second)


def test_codes_that_no_ids_decode_to_are_refused():
    q = build("multiscale").eval()
    codes = q.ids_to_codes(random_ids(q, 3))
    codes[1] += 0.1 * torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"No ids were found that decode to codes \[1\]. Keep the ids"):
        q.codes_to_ids(codes)


@pytest.mark.slow
def test_ids_of_the_published_size_come_back():
    q = build("multiscale", codebook_size=4096, dim=32, scales=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16]).eval()
    ids = random_ids(q, 1)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)
