"""One-D-Piece against the official implementation, and what any nested tokenizer has to do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.fill import image
from vistok.data.base import Batch
from vistok.hub import count_parameters, on_meta
from vistok.tokens import Tokens, stack
from vistok.train.steps.base import tokenizer_options


def tiny(name="one_d_piece_tiny", **kwargs):
    return vistok.create("tokenizer", name, **kwargs).eval()


def batch(images, first=0, seed=0):
    return Batch(images, torch.arange(first, first + len(images)), seed)


@pytest.mark.parity
def test_s256_matches_the_official_ids_logits_and_pixels_at_every_length(golden, tmp_path):
    ref = golden("one_d_piece_s256")
    (tmp_path / "config.json").write_text(json.dumps(ref.meta["config"]))
    save_file(ref.state_dict(), tmp_path / "model.safetensors")
    tok = vistok.load(tmp_path)
    assert tok.registry_name == "one_d_piece"
    x = image(1, 256, 1)
    with torch.no_grad():
        z = tok.encode_features(x).transpose(1, 2).unsqueeze(2)
        torch.testing.assert_close(z[..., ::2], ref["z"], atol=2e-4, rtol=0)
        tokens = tok.encode(x)
        sure = ref["top2_margin"] > 1e-4
        assert torch.equal(tokens.ids[0][sure], ref["ids"][0, 0][sure])
        random_ids = torch.from_numpy(np.random.default_rng(12).integers(0, 4096, (1, 1, 256)))[:, 0]
        for k in ref.meta["lengths"]:
            logits = tok.decode_logits(tokens.codes[:, :k]).transpose(1, 2).unflatten(2, (16, 16))
            torch.testing.assert_close(logits[:, ::16, ::3, ::3], ref[f"logits_{k}"], atol=2e-4, rtol=0)
            pictures = tok.decode(tokens[:, :k])[..., ::7, ::7]
            torch.testing.assert_close(pictures, ref[f"image_{k}"].clamp(0, 1), atol=5e-4, rtol=0)
            drawn = tok.decode(random_ids[:, :k])[..., ::7, ::7]
            torch.testing.assert_close(drawn, ref[f"random_ids_image_{k}"].clamp(0, 1), atol=5e-4, rtol=0)


@pytest.mark.parity
def test_single_weight_file_is_recognised_by_its_number_of_tokens(golden):
    from vistok.tokenizers.official import titok as layout

    ref = golden("one_d_piece_s256")
    tensors = {k: torch.empty(tuple(s), device="meta") for k, s in ref.meta["state_dict"]}
    assert layout.convert({}, tensors)[:2] == layout.convert(ref.meta["config"], tensors)[:2]


@pytest.mark.parametrize(("size", "millions"), [("s", 83.9), ("b", 205.3), ("l", 641.7)])
def test_published_models_have_the_published_size(size, millions):
    found = count_parameters(on_meta("tokenizer", f"one_d_piece_{size}256.in1k")) / 1e6
    assert found == pytest.approx(millions, abs=0.06)


def nested(name):
    """Nested tokenizers of every kind there is, 16 tokens of 64 x 64 pixels."""
    return tiny() if name == "one_d_piece" else tiny("spectral_titok_tiny", num_tokens=16, nested=True)


NESTED = pytest.mark.parametrize("name", ["one_d_piece", "spectral_titok"])


@NESTED
@pytest.mark.parametrize("k", [1, 5, 16])
def test_encoding_fewer_tokens_is_a_prefix_and_decodes(name, k):
    tok, x = nested(name), image(3, 64)
    short, full = tok.encode(x, num_tokens=k), tok.encode(x)
    assert torch.equal(short.ids, full.ids[:, :k])
    assert torch.equal(tok.decode(short), tok.decode(full[:, :k]))
    assert torch.equal(tok.decode(short.ids), tok.decode(short))


def test_coarse_tokens_come_first_in_a_nested_transform(photos):
    tok = nested("spectral_titok")
    tokens, photo = tok.encode(photos[1]), tok.preprocess(photos[1])
    errors = [float((tok.decode(tokens[:, :k]) - photo).square().mean()) for k in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]


def test_length_changes_the_picture():
    tok = tiny()
    tokens = tok.encode(image(1, 64))
    assert not torch.allclose(tok.decode(tokens[:, :4]), tok.decode(tokens), atol=1e-3)


@NESTED
def test_padded_batch_of_different_lengths_equals_the_rows_one_by_one(name):
    tok = nested(name)
    rows = [tok.encode(image(1, 64, seed), num_tokens=k) for seed, k in enumerate((1, 7, 16, 3))]
    together = tok.decode(stack(rows))
    for row, picture in zip(rows, together):
        torch.testing.assert_close(tok.decode(row)[0], picture, atol=1e-4, rtol=0)


@NESTED
def test_what_lies_beyond_a_row_does_not_matter(name):
    tok = nested(name)
    tokens = stack([tok.encode(image(1, 64), num_tokens=k) for k in (3, 16)])
    ids = tokens.ids.clone()
    ids[0, 3:] = 255
    other = Tokens(ids=ids, lengths=tokens.lengths, vocab=tokens.vocab)
    assert torch.equal(tok.decode(other), tok.decode(Tokens(ids=tokens.ids, lengths=tokens.lengths)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode(image(1, 64), num_tokens=17), r"num_tokens is 1\.\.16"),
        (lambda t: t.encode(image(1, 64), num_tokens=0), r"num_tokens is 1\.\.16"),
        (lambda t: t.decode(torch.zeros(1, 17, dtype=torch.int64)), r"decodes 1\.\.16 tokens .* got 17"),
        (lambda t: t.decode(torch.zeros(1, 0, dtype=torch.int64)), r"decodes 1\.\.16 tokens .* got 0"),
        (lambda t: t(image(2, 64), lengths=torch.tensor([0, 3])), r"Lengths of one_d_piece are 1\.\.16, got 0\.\.3"),
        (lambda t: t(image(2, 64), lengths=torch.tensor([1, 17])), r"got 1\.\.17"),
    ],
)
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


def test_others_refuse_lengths_in_training():
    with pytest.raises(ValueError, match="Lengths of titok are always 16, got 3"):
        vistok.create("tokenizer", "titok_tiny")(image(1, 64), lengths=torch.tensor([3]))


def test_drawn_lengths_are_uniform_on_all_lengths():
    tok = tiny()
    drawn = tok.draw_lengths(torch.linspace(0, 1, 1601, dtype=torch.float64)[:-1])
    assert torch.equal(drawn.bincount(), torch.tensor([0] + 16 * [100]))


def test_drawn_lengths_are_keyed_by_seed_step_and_sample():
    tok, x = tiny(), image(4, 64)
    whole = tokenizer_options(tok, batch(x, 8), 2)["lengths"]
    halves = [tokenizer_options(tok, batch(x[:2], first), 2)["lengths"] for first in (8, 10)]
    assert torch.equal(whole, torch.cat(halves))
    assert len(set(whole.tolist())) > 1
    assert not torch.equal(whole, tokenizer_options(tok, batch(x, 8, seed=1), 2)["lengths"])


def test_one_length_a_step_is_the_same_for_all():
    tok, x = tiny(), image(3, 64)
    lengths = [tokenizer_options(tok, batch(x, first), 5, "step")["lengths"] for first in (0, 3)]
    assert len(set(torch.cat(lengths).tolist())) == 1
    steps = {int(tokenizer_options(tok, batch(x), step, "step")["lengths"][0]) for step in range(20)}
    assert len(steps) > 5


def test_dropped_tokens_get_no_gradient_from_the_reconstruction_but_from_the_quantizer():
    tok = tiny().train()
    out = tok(image(1, 64), lengths=torch.tensor([4]))
    grad = torch.autograd.grad(out.images.square().mean(), out.quantized.codes, retain_graph=True)[0]
    assert grad[:, :4].abs().amax() > 0
    assert torch.count_nonzero(grad[:, 4:]) == 0
    assert out.tokens.num_tokens == 16
    torch.testing.assert_close(out.quantized.loss, tok.eval()(image(1, 64)).quantized.loss)


def test_training_with_lengths_equals_decoding_the_prefixes():
    tok, x = tiny(), image(3, 64)
    lengths = torch.tensor([2, 16, 9])
    with torch.no_grad():
        together = tok(x, lengths=lengths).images
        for i, k in enumerate(lengths.tolist()):
            one = tok.decode_codes(tok.encode(x).codes[i : i + 1, :k])
            torch.testing.assert_close(together[i : i + 1], one, atol=1e-4, rtol=0)


def test_bf16_model_decodes_a_ragged_batch():
    tok = tiny().to(torch.bfloat16)
    tokens = stack([tok.encode(image(1, 64), num_tokens=k) for k in (2, 11)])
    assert tok.decode(tokens).isfinite().all()
