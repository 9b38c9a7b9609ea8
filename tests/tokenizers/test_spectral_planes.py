"""The nested tokenizer of frequency digits: order, exactness, prefixes, what training may change."""

import pytest
import torch

import vistok
from vistok.tokenizers.spectral_planes import PLANES, PlaneCode, rank_digits


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return vistok.create("tokenizer", "spectral_planes_tiny").eval()


def picture(seed: int = 0, batch: int = 2, size: int = 64) -> torch.Tensor:
    """Smooth random pictures, which have the spectrum of natural ones."""
    draw = torch.Generator().manual_seed(seed)
    x = sum(
        torch.nn.functional.interpolate(torch.rand(batch, 3, n, n, generator=draw), (size, size), mode="bicubic")
        for n in (2, 4, 8, 16)
    )
    return (x / 4).clamp(0, 1)


def test_digits_of_a_coefficient_stand_in_order():
    coefficient, plane = rank_digits((32, 48), 3000)
    assert len(set(zip(coefficient.tolist(), plane.tolist()))) == 3000
    for c in (0, int(coefficient[50]), int(coefficient[500])):
        planes = plane[coefficient == c].tolist()
        assert planes == list(range(len(planes)))
    assert coefficient[0] in (0, 32 * 48, 2 * 32 * 48)  # a mean colour comes first


def test_all_digits_give_the_picture_back(tokenizer):
    code, x = PlaneCode((16, 24), 16 * 24, 3 * PLANES), picture(size=32)[:, :, :16, :24]
    error = (code.synthesise(code.analyse(x)) - x).square().mean().sqrt()
    assert error < code.threshold(PLANES - 1)  # no coefficient is off by more than the width of the finest interval


def test_more_tokens_mean_a_smaller_error_and_prefixes_are_the_same_ids(tokenizer):
    x = picture()
    full = tokenizer.encode(x)
    assert full.ids.shape == (2, 32, 6) and full.vocab == (2187,) * 6
    errors = []
    for k in (1, 4, 16, 32):
        short = tokenizer.encode(x, k)
        assert torch.equal(short.ids, full.ids[:, :k])
        errors.append(float((tokenizer.decode(short) - x).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_rows_of_different_lengths_are_what_they_are_alone(tokenizer):
    x = picture(batch=3)
    tokens = tokenizer.encode(x)
    lengths = torch.tensor([3, 32, 11])
    mixed = tokenizer(x, lengths=lengths).images.clamp(0, 1)
    for i, k in enumerate(lengths.tolist()):
        torch.testing.assert_close(mixed[i : i + 1], tokenizer.decode(tokens[i][:, :k]), atol=1e-5, rtol=1e-5)


def test_any_ids_decode(tokenizer):
    ids = torch.randint(0, 2187, (2, 32, 6), generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(tokenizer.decode(ids)).all()


def test_half_precision_and_training_leave_the_ids(tokenizer):
    x = picture()
    ids, name = tokenizer.encode(x).ids, tokenizer.model_id
    half = vistok.create("tokenizer", "spectral_planes_tiny").eval().to(torch.bfloat16)
    assert torch.equal(half.encode(x).ids, ids) and half.model_id == name
    assert not any(k.split(".")[0] == "code" for k, _ in tokenizer.named_parameters())


def test_an_untrained_decoder_adds_nothing(tokenizer):
    x = picture()
    tokens = tokenizer.encode(x)
    plain = tokenizer.code.synthesise(tokens.codes).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(tokens), plain)


def test_save_and_load_are_exact(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    x = picture()
    assert torch.equal(again.decode(again.encode(x, 5)), tokenizer.decode(tokenizer.encode(x, 5)))
    assert again.model_id == tokenizer.model_id


def test_lengths_are_drawn_from_one_to_all(tokenizer):
    drawn = tokenizer.draw_lengths(torch.linspace(0, 0.999999, 4000, dtype=torch.float64))
    assert int(drawn.min()) == 1 and int(drawn.max()) == 32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quantizer": {"name": "bsq", "dim": 18}}, "quantizer is ternary, got 'bsq'"),
        ({"image_size": 60}, "multiple of patch_size 8"),
        ({"num_tokens": 100_000}, r"A picture of 64x64 has 1\.\.110592 digits"),
    ],
)
def test_impossible_configurations_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        vistok.create("tokenizer", "spectral_planes_tiny", **change)


def test_a_ternary_quantizer_says_how_many_digits_fit():
    with pytest.raises(ValueError, match="groups of at most 39 digits"):
        vistok.create("quantizer", "ternary", dim=80, groups=2)


def test_a_longer_code_starts_from_the_same_decoder(tokenizer):
    torch.manual_seed(1)
    longer = vistok.create("tokenizer", "spectral_planes_tiny", num_tokens=80).eval()
    longer.start_from(tokenizer, "the shorter one")
    x = picture()
    short, tokens = tokenizer.encode(x), longer.encode(x)
    assert torch.equal(tokens.ids[:, :32], short.ids)
    assert torch.equal(longer.decode(tokens[:, :32]), tokenizer.decode(short))
    assert float((longer.decode(tokens) - x).abs().mean()) < float((longer.decode(tokens[:, :32]) - x).abs().mean())
    drawn = longer.draw_lengths(torch.linspace(0, 0.9999, 1000, dtype=torch.float64))
    assert drawn.min() == 1 and drawn.max() == 64  # the decoder counts 64 of its tokens as the whole
