"""TexTok: text on both sides, against what its paper says."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.fill import image
from vistok.hub import LoadError, count_parameters, on_meta
from vistok.tokenizers.text_encoders import TextEncoder, Texts


def tiny(**kwargs):
    return vistok.create("tokenizer", "textok_tiny", **kwargs).eval()


def parts(**kwargs):
    tok = on_meta("tokenizer", "textok_128", **kwargs)
    return [count_parameters(part) / 1e6 for part in (tok.encoder, tok.decoder)]


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"),
    [
        ({}, 87.79, 88.48),
        ({"patch_size": 16}, 87.64, 87.74),
        ({"text_encoder": {"kind": "t5", "model": "x", "length": 128, "dim": 2048}}, 87.87, 88.55),
        ({"image_size": 512, "text_encoder": {"kind": "t5", "model": "x", "length": 128, "dim": 4096}}, 91.80, 94.85),
    ],
)
def test_sizes_are_those_that_the_papers_total_implies(config, encoder, decoder):
    assert parts(**config) == pytest.approx([encoder, decoder], abs=0.012)


def test_caption_changes_latents_and_pictures():
    tok, x = tiny(), image(2, 64)
    red, none = tok.encode(x, text="a red dog"), tok.encode(x)
    assert not torch.allclose(red.codes, none.codes, atol=1e-5)
    assert not torch.allclose(tok.decode(red), tok.decode(red, text=""), atol=1e-5)
    torch.testing.assert_close(tok.decode(red), tok.decode(red, text="a red dog"))


@pytest.mark.parametrize(("where", "encoder", "decoder"), [("encoder", True, False), ("decoder", False, True)])
def test_either_side_can_go_without_text(where, encoder, decoder):
    tok, x = tiny(text=where), image(1, 64)
    red, none = tok.encode(x, text="a red dog"), tok.encode(x)
    assert torch.equal(red.codes, none.codes) is not encoder
    assert torch.equal(tok.decode(none, text="a red dog"), tok.decode(none)) is not decoder


def test_without_text_it_is_the_papers_baseline():
    tok, x = tiny(text="none"), image(1, 64)
    assert torch.equal(tok.decode(tok.encode(x, text="a red dog")), tok.decode(tok.encode(x)))
    assert tok.texts.encoded == 0


def test_a_caption_is_encoded_once_for_both_sides():
    tok = tiny()
    for _ in range(2):
        tok.decode(tok.encode(image(1, 64), text="a red dog"))
        tok(image(1, 64), text=["a red dog"])
    assert tok.texts.encoded == 1


def test_silent_projection_leaves_the_gradients_of_the_picture_alone():
    tok, x = tiny(quantizer={"name": "fsq", "levels": [8, 8]}), image(1, 64)
    with torch.no_grad():
        for side in (tok.encoder, tok.decoder):
            side.text_proj.weight.zero_()
            side.text_proj.bias.zero_()

    def gradient(text):
        tok.zero_grad()
        tok(x, text=text).images.square().mean().backward()
        return tok.encoder.patch_embed.weight.grad.clone()

    assert torch.equal(gradient(["a red dog"]), gradient(["an old boat"]))


def test_training_reaches_every_parameter():
    tok = tiny().train()
    out = tok(image(2, 64), text=["a cat", "a dog"])
    (out.images.square().mean() + out.quantized.loss).backward()
    assert [n for n, p in tok.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("quantizer", [{"name": "vq", "codebook_size": 64, "dim": 8}, {"name": "lfq", "dim": 8}])
@pytest.mark.parametrize("batch", [1, 3])
def test_discrete_latents_decode_from_ids(quantizer, batch):
    tok, x = tiny(quantizer=quantizer), image(batch, 64)
    tokens = tok.encode(x, text="a cat")
    assert tokens.ids.shape == (batch, 16)
    torch.testing.assert_close(tok.decode(tokens.ids, text="a cat"), tok.decode(tokens), rtol=0, atol=1e-6)


def test_saved_and_loaded_tokenizer_is_bit_identical(tmp_path):
    tok, x = tiny(), image(1, 64)
    tok.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert torch.equal(again.decode(again.encode(x, text="a cat")), tok.decode(tok.encode(x, text="a cat")))


def test_resized_model_takes_wide_pictures():
    tok = tiny()
    wide = tok.resized((64, 128))
    x = torch.rand(1, 3, 64, 128)
    assert wide.decode(wide.encode(x, text="a cat")).shape == (1, 3, 64, 128)
    assert torch.equal(wide.encoder.position[-24:], tok.encoder.position[-24:])
    assert torch.equal(tok.resized((64, 64)).encode(image(1, 64)).codes, tok.encode(image(1, 64)).codes)


def test_whole_model_in_bf16_encodes_and_decodes():
    tok = tiny().to(torch.bfloat16)
    assert tok.decode(tok.encode(image(1, 64), text="a cat")).isfinite().all()


# -- T5 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A folder with a random T5 encoder and a word-level tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "dog", "cat"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("t5")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    config = T5Config(vocab_size=7, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5EncoderModel(config).eval()
    model.save_pretrained(folder)
    return folder, model


def test_t5_features_are_the_last_hidden_states_without_padding(t5):
    folder, model = t5
    texts = Texts(TextEncoder(kind="t5", model=str(folder), length=6, dim=32))
    found = texts(["a red dog", "cat"], torch.device("cpu"))
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[6, 1]])).last_hidden_state  # cat </s>
    torch.testing.assert_close(found[1, :2], alone[0], atol=1e-5, rtol=0)
    assert torch.count_nonzero(found[1, 2:]) == 0
    assert torch.count_nonzero(found[0, 3]) == 32


def test_long_captions_are_cut(t5):
    texts = Texts(TextEncoder(kind="t5", model=str(t5[0]), length=3, dim=32))
    assert texts(["a red dog a cat a dog"], torch.device("cpu")).shape == (1, 3, 32)


def test_tokenizer_works_with_a_real_t5_in_bf16(t5):
    encoder = {"kind": "t5", "model": str(t5[0]), "length": 6, "dim": 32, "precision": "bf16"}
    tok, x = tiny(text_encoder=encoder), image(1, 64)
    assert not torch.allclose(tok.encode(x, text="a red dog").codes, tok.encode(x, text="cat").codes, atol=1e-5)


def test_absent_t5_is_one_clear_line(tmp_path):
    tok = tiny(text_encoder={"kind": "t5", "model": str(tmp_path / "none"), "length": 6, "dim": 32})
    with pytest.raises(LoadError, match=r"Text encoder t5 .*/none cannot be loaded: .*text features \(B, 6, 32\)"):
        tok.encode(image(1, 64), text="a cat")
