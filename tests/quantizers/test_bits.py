"""Ids, bits and bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from tests.quantizers.zoo import build, features
from vistok.quantizers.bits import (
    bits_to_groups,
    bits_to_ids,
    groups_to_bits,
    ids_to_bits,
    merge_ids,
    pack_bits,
    split_ids,
    unpack_bits,
)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("bits", [1, 18, 31, 32, 40, 62, 63])
def test_ids_and_bits_are_inverse_up_to_63_bits(order, bits):
    pattern = torch.rand(500, bits) < 0.5
    pattern[0] = True
    ids = bits_to_ids(pattern, order)
    assert int(ids[0]) == 2**bits - 1
    assert torch.equal(ids_to_bits(ids, bits, order), pattern)


def test_bit_order_says_which_end_channel_zero_is():
    pattern = torch.tensor([True, False, False])
    assert int(bits_to_ids(pattern, "little")) == 1
    assert int(bits_to_ids(pattern, "big")) == 4


def test_64_bits_in_one_id_are_refused():
    with pytest.raises(ValueError, match="1 to 63 bits, got 64"):
        bits_to_ids(torch.zeros(2, 64, dtype=torch.bool))


@given(st.lists(st.integers(1, 15), min_size=1, max_size=4), st.integers(0, 2**60 - 1))
@settings(max_examples=50, deadline=None)
def test_split_and_merge_are_inverse(bits, value):
    ids = torch.tensor([value % 2 ** sum(bits)])
    assert torch.equal(merge_ids(split_ids(ids, bits), bits), ids)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("bits", [1, 8, 12, 64, 100])
def test_packed_bytes_are_those_of_numpy(order, bits):
    pattern = torch.rand(3, 5, bits) < 0.5
    packed = pack_bits(pattern, order)
    expected = np.packbits(pattern.numpy(), axis=-1, bitorder=order)
    assert np.array_equal(packed.numpy(), expected)
    assert torch.equal(unpack_bits(packed, bits, order), pattern)


def test_groups_hold_more_than_63_bits():
    pattern = torch.rand(4, 128) < 0.5
    assert torch.equal(groups_to_bits(bits_to_groups(pattern, 16), 8), pattern)


def test_byte_groups_are_the_packed_bytes():
    pattern = torch.rand(4, 64) < 0.5
    assert torch.equal(bits_to_groups(pattern, 8).to(torch.uint8), pack_bits(pattern, "little"))


LARGEST = {
    "fsq": {"levels": [8] * 21},
    "fsq_symmetric": {"levels": [2] * 63},
    "bsq": {"dim": 63},
    "bsq_grouped": {"dim": 126, "groups": 2, "entropy_group": 9},
    "lfq": {"dim": 22},
    "group_lfq": {"dim": 128, "groups": 16},
    "binary": {"dim": 128, "num_bits": 63},
    "binary_64": {"dim": 128, "num_bits": 128},
}


@pytest.mark.parametrize("kind", LARGEST)
def test_largest_vocabularies_are_exact_both_ways(kind):
    q = build(kind, **LARGEST[kind]).eval()
    top = torch.tensor([v - 1 for v in q.vocab_sizes])
    draws = [torch.zeros_like(top), top] + [torch.tensor([int(v * f) for v in top.tolist()]) for f in (0.3, 0.77)]
    ids = q.ungrouped(torch.stack(draws).clamp(max=top).unsqueeze(0))
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


@pytest.mark.parametrize("kind", ["vq", "vq_l2", "ibq", "simvq", "vq_ema"])
def test_largest_tables_are_exact_both_ways(kind):
    q = build(kind, codebook_size=2**16, dim=16, **({"frozen_dim": 16} if kind == "simvq" else {})).eval()
    ids = torch.cat([torch.tensor([0, 2**16 - 1]), torch.randint(2**16, (62,))]).unsqueeze(0)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


@pytest.mark.parametrize("kind", ["vq", "vq_ema", "ibq", "multi"])
def test_rows_close_together_and_far_from_zero_go_round(kind):
    q = build("vq" if kind == "multi" else kind).eval()
    table = 10 + torch.randn(64, 8) * 1e-3
    if kind == "multi":
        table[:32] -= 20
    with torch.no_grad():
        (q.codebook if kind == "vq_ema" else q.embedding.weight).copy_(table)
    ids = torch.arange(64).unsqueeze(0)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


def test_codes_that_are_in_no_table_get_the_nearest_row():
    q = build("vq").eval()
    ids = torch.arange(64).unsqueeze(0)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids) + 1e-3), ids)


def test_fsq_ids_are_exact_where_float_sums_are_not():
    q = build("fsq", levels=[16] * 7)
    ids = torch.randint(2**28, (1, 2000))
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


@pytest.mark.parametrize("levels", [[26, 27], [38, 39]])
def test_fsq_levels_that_truncation_breaks_go_round(levels):
    q = build("fsq", levels=levels)
    ids = torch.arange(q.vocab_sizes[0]).unsqueeze(0)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


def test_every_small_fsq_codebook_goes_round():
    for n in range(2, 14):
        for kind in ("fsq", "fsq_symmetric"):
            q = build(kind, levels=[n, 3])
            ids = torch.arange(3 * n).unsqueeze(0)
            assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("lfq", {"dim": 32}, "group_lfq, dim: 32, groups: 4"),
        ("group_lfq", {"dim": 64, "groups": 2}, "Group the bits"),
        ("group_lfq", {"dim": 30, "groups": 4}, "dim=30 does not split into groups=4"),
        ("bsq", {"dim": 64}, "Set groups=8, i.e. 8 bits an id"),
        ("bsq", {"dim": 65}, "Set groups=13, i.e. 5 bits an id"),
        ("binary", {"dim": 64, "num_bits": 70}, "multiple of 8"),
        ("fsq", {"levels": [8] * 22}, "Give fewer levels and groups > 1"),
        ("fsq", {"levels": [2**23]}, "tell at most 2\\^22 levels apart.* two of 2897"),
        ("fsq", {"levels": [8, 1]}, "levels must be whole numbers of at least 2"),
        ("vq", {"codebook_size": 0, "dim": 8}, "codebook_size must be a whole number of at least 1"),
        ("residual", {"base": {"name": "gaussian", "dim": 4}, "layers": 2}, "cannot be a residual level"),
        ("multiscale", {"codebook_size": 8, "dim": 4, "scales": [2, 1]}, "scales must be whole numbers that grow"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(kind, config, message):
    with pytest.raises(ValueError, match=message):
        vistok.create("quantizer", kind, **config)


@pytest.mark.parametrize(("dim", "bits"), [(8, 12), (16, 24), (4, 8), (2, 10), (70, 80)])
def test_more_bits_than_channels_come_back(dim, bits):
    q = build("binary", dim=dim, num_bits=bits).eval()
    shape = (3, 7) if bits <= 63 else (3, 7, bits // 8)
    ids = torch.randint(q.vocab_sizes[0], shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


def test_dependent_but_distinguishable_vectors_come_back():
    q = build("binary", dim=4, num_bits=3).eval()
    with torch.no_grad():
        q.embed[2] = 4 * q.embed[1]
    ids = torch.arange(8).reshape(1, 8)
    assert torch.equal(q.codes_to_ids(q.ids_to_codes(ids)), ids)


def test_too_many_bits_to_try_are_refused():
    q = build("binary", dim=8, num_bits=40).eval()
    with pytest.raises(
        ValueError, match=r"40 bit vectors have rank 8: 32 bits.*at most 2\^16.*dim of at least num_bits"
    ):
        q.codes_to_ids(q(features(q)).codes)


@pytest.mark.parametrize("nearly", [0.0, 1e-6])
def test_bit_vectors_that_cannot_be_told_apart_do_not_pretend_to_be_invertible(nearly):
    q = build("binary").eval()
    with torch.no_grad():
        q.embed[1] = q.embed[0] * (1 + nearly)
    with pytest.raises(ValueError, match="more than one set|too nearly dependent"):
        q.codes_to_ids(q.ids_to_codes(torch.arange(2**12).unsqueeze(0)))


@pytest.mark.parametrize(("dim", "bits"), [(16, 12), (8, 12)])
def test_codes_that_are_no_sums_are_refused(dim, bits):
    q = build("binary", dim=dim, num_bits=bits).eval()
    codes = q.ids_to_codes(torch.arange(8).reshape(1, 8))
    with pytest.raises(ValueError, match="no sums of the bit vectors"):
        q.codes_to_ids(codes + torch.linspace(-3, 3, dim))


def test_zero_is_the_lower_sign():
    q = build("group_lfq").eval()
    out = q(torch.zeros(1, 2, 32))
    assert int(out.ids.max()) == 0
    assert float(out.codes.max()) == -1
