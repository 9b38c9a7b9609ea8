"""Entropy coding: lossless for any ids, close to the entropy, flagged in the container."""

import binascii
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vistok
from vistok.codec.planes import PlanePrior
from vistok.codec.prior import TOTAL, PositionPrior, fit, read, whole
from vistok.hub import LoadError
from vistok.tokens import FLAG_CODED, HEADER, MAGIC, VERSION, ContainerError, Tokens, from_bytes, pack, to_bytes

pytest.importorskip("constriction", reason="the range coder is not installed: pip install 'vistok[codec]'")
MODEL, VOCAB = "0123abcd", (16, 5)


def skewed(seed: int, count: int = 60, k: int = 30) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([(torch.rand(count, k, generator=draw) ** 4 * v).long() for v in VOCAB], -1)


@pytest.fixture(scope="module")
def prior() -> PositionPrior:
    return PositionPrior.fit(skewed(0), VOCAB)


@pytest.fixture(scope="module")
def planes() -> tuple[PlanePrior, Tokens]:
    tokenizer = vistok.create("tokenizer", "spectral_planes_tiny", num_tokens=12).eval()
    draw = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(24, 3, 4, 4, generator=draw), (64, 64), mode="bilinear")
    tokens = tokenizer.encode(x)
    return fit(tokenizer, tokens.ids), tokens


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(0, 30))
def test_any_ids_come_back(prior, seed, k):
    ids = torch.stack([torch.randint(v, (k,), generator=torch.Generator().manual_seed(seed)) for v in VOCAB], -1)
    assert torch.equal(prior.decode(prior.encode(ids), k), ids)


def test_the_code_is_as_long_as_the_prior_says(prior):
    ids = skewed(1)[0]
    data = prior.encode(ids)
    assert len(data) < 0.85 * len(pack(ids, VOCAB))
    assert abs(8 * len(data) - prior.bits(ids).sum()) <= 40


def test_digit_priors_are_lossless(planes):
    prior, tokens = planes
    for k in (0, 1, 5, 12):
        assert torch.equal(prior.decode(prior.encode(tokens.ids[0, :k]), k), tokens.ids[0, :k])
    anything = torch.randint(2187, (12, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior.decode(prior.encode(anything), 12), anything)
    assert len(prior.encode(tokens.ids[0])) < len(pack(tokens.ids[0], tokens.vocab))
    assert abs(8 * len(prior.encode(tokens.ids[0])) - prior.bits(tokens.ids[0]).sum()) <= 40


def test_lengths_are_those_of_the_codes_of_all_prefixes(planes, prior):
    for one, ids in ((planes[0], planes[1].ids[0]), (prior, skewed(1)[0])):
        every = [len(one.encode(ids[:k])) for k in range(1, len(ids) + 1)]
        assert one.lengths(ids) == every
        few = one.lengths(ids, 4)
        assert few == every[: len(few)] and all(length > 4 for length in every[len(few) :])


def test_distributions_are_whole_numbers_and_nothing_is_impossible():
    table = whole(np.array([[1.0, 0.0, 0.0], [1e-9, 1.0, 5.0]]))
    assert (table.sum(1) == TOTAL).all() and (table >= 1).all()


def test_no_shorter_bytes_say_the_same_and_few_are_lost_to_rounding(planes):
    """What is written exceeds the ideal length by about a byte on average: it does not end on whole words."""
    prior, tokens = planes
    extra = []
    for k in range(1, 13):
        ids = tokens.ids[0, :k]
        data = prior.encode(ids)
        assert torch.equal(prior.decode(data, k), ids)
        assert not data or data[-1] != 0
        assert not torch.equal(prior.decode(data[:-1], k), ids)
        extra.append(len(data) - prior.bits(ids).sum() / 8)
    assert -0.5 < np.mean(extra) < 1.2


def test_the_network_of_digits_pays(planes):
    """Where digits tell of their neighbours, codes are shorter than under the chances of positions alone."""
    prior, tokens = planes
    silent = {name: np.zeros_like(getattr(prior, name)) for name in ("first", "bias", "last")}
    alone = PlanePrior(**{**prior.arrays(), **silent})
    bits = [sum(p.bits(ids).sum() for ids in tokens.ids) for p in (prior, alone)]
    assert bits[0] < 0.98 * bits[1]


def test_priors_are_saved_beside_weights(planes, prior, tmp_path):
    for one in (planes[0], prior):
        one.save(tmp_path)
        again = read(tmp_path)
        assert type(again) is type(one) and again.check == one.check
    assert read(tmp_path / "nowhere") is None
    (tmp_path / "prior.npz").write_bytes(b"PK no archive")
    with pytest.raises(LoadError, match="is no prior of vistok"):
        read(tmp_path)


def test_a_container_says_that_it_is_coded_and_needs_the_same_prior(prior):
    tokens = Tokens(ids=skewed(1)[:1], vocab=VOCAB, size=(8, 8))
    data = to_bytes(tokens, MODEL, prior)
    assert data[2] & FLAG_CODED and len(data) < len(to_bytes(tokens, MODEL))
    found = from_bytes(data, vocab=VOCAB, model_id=MODEL, prior=prior)
    assert torch.equal(found.ids, tokens.ids)
    with pytest.raises(ContainerError, match="the model given has no prior"):
        from_bytes(data, vocab=VOCAB, model_id=MODEL)
    other = PositionPrior.fit(skewed(7), VOCAB)
    with pytest.raises(ContainerError, match="or it was coded with another prior"):
        from_bytes(data, vocab=VOCAB, model_id=MODEL, prior=other)


def test_ids_that_do_not_shrink_are_packed(prior):
    ids = torch.stack([torch.full((1, 30), v - 1) for v in VOCAB], -1)  # the rarest of all
    data = to_bytes(Tokens(ids=ids, vocab=VOCAB), MODEL, prior)
    assert not data[2] & FLAG_CODED
    assert torch.equal(from_bytes(data, vocab=VOCAB, model_id=MODEL, prior=prior).ids, ids)


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_of_a_coded_file_is_found(prior, at):
    data = bytearray(to_bytes(Tokens(ids=skewed(1)[:1], vocab=VOCAB), MODEL, prior))
    bit = int(at * 8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ContainerError):
        from_bytes(bytes(data), vocab=VOCAB, model_id=MODEL, prior=prior)


def test_longer_codes_than_the_prior_knows_are_refused(prior):
    with pytest.raises(ValueError, match="up to 30 tokens, these have 31"):
        prior.encode(torch.zeros(31, 2, dtype=torch.int64))


def test_any_damage_to_a_stored_prior_is_one_error(prior, tmp_path):
    prior.save(tmp_path)
    data, rng = (tmp_path / "prior.npz").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for at in rng.integers(len(data), size=rng.integers(1, 6)):
            changed[at] = rng.integers(256)
        (tmp_path / "prior.npz").write_bytes(changed[: rng.integers(1, len(data))] if rng.random() < 0.3 else changed)
        try:
            assert read(tmp_path).arrays().keys() == prior.arrays().keys()  # what no reader looks at was changed
        except LoadError as err:
            assert "prior.npz is no prior of vistok" in str(err) or "prior.npz unpacks to more than" in str(err)


def test_a_prior_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vistok.codec.prior.LARGEST", 2**20)
    with (
        zipfile.ZipFile(tmp_path / "prior.npz", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("counts.npy", "w") as out,
    ):
        for _ in range(2):
            out.write(bytes(1 << 20))
    with pytest.raises(LoadError, match="unpacks to more than 1 MB"):
        read(tmp_path)


@settings(max_examples=200, deadline=None)
@given(
    flags=st.integers(0, 7),
    k=st.integers(0, 127),
    body=st.binary(max_size=80),
)
def test_well_formed_nonsense_is_read_or_refused(prior, flags, k, body):
    """Whatever stands behind a right checksum: tokens of the vocabulary, or one error; never anything else."""
    head, body = HEADER.pack(MAGIC, VERSION << 4 | flags, bytes.fromhex(MODEL), 0)[:-2], bytes([k]) + body
    start = prior.check if flags & FLAG_CODED else 0
    data = head + binascii.crc_hqx(head + body, start).to_bytes(2, "big") + body
    try:
        found = from_bytes(data, vocab=VOCAB, model_id=MODEL, prior=prior)
    except ContainerError as err:
        assert "\n" not in str(err)
    else:
        assert found.num_tokens == k and bool((found.ids < torch.tensor(VOCAB)).all()) and bool((found.ids >= 0).all())
