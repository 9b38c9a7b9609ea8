"""No tensor that the mathematics does not need."""

from __future__ import annotations

import pytest

from tests.quantizers.zoo import LargestTensor, build, features
from vistok.quantizers.search import TILE

N = 8 * 256


def largest(q, scale=1.0):
    z = features(q, 8, 256, scale).requires_grad_()
    with LargestTensor() as seen:
        out = q(z)
        (out.loss + out.codes.sum()).backward()
    return seen.elements


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("fsq", {"levels": [8] * 6}),
        ("fsq_symmetric", {"levels": [8] * 6}),
        ("bsq", {"dim": 36}),
        ("binary", {"dim": 64, "num_bits": 48}),
    ],
)
def test_nothing_is_larger_than_the_features(kind, changes):
    q = build(kind, **changes)
    assert largest(q) <= N * max(q.dim, q.in_dim)


@pytest.mark.parametrize("kind", ["vq", "vq_ema", "ibq", "vq_entropy", "cvq", "simvq", "vq_stochastic"])
def test_nothing_is_larger_than_a_tile_or_the_table(kind):
    size = 2**13
    q = build(kind, codebook_size=size)
    assert N * size > 4 * TILE
    assert largest(q) <= max(TILE, N * q.dim, size * (q.dim + 1))


def test_lfq_needs_two_half_tables_and_one_distribution():
    q = build("lfq", dim=18)
    assert largest(q, 0.01) <= max(N * 2**9, 2**18, N * 18)


def test_group_lfq_is_linear_in_the_number_of_groups():
    q = build("group_lfq", dim=64, groups=8)
    assert largest(q, 0.01) <= N * 8 * 2**4
