"""TA-TiTok against the official implementation; captions from users, data sets, files and none."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.fill import image
from vistok import tokens as container
from vistok.data.base import Batch
from vistok.hub import LoadError, count_parameters, on_meta
from vistok.tokenizers.official import titok as layout
from vistok.tokenizers.text_encoders import TextEncoder, Texts
from vistok.tokens import Tokens
from vistok.train.steps.base import tokenizer_options


@pytest.fixture
def official(golden, tmp_path):
    def load(name):
        ref = golden(name)
        (tmp_path / "config.json").write_text(json.dumps(ref.meta["config"]))
        save_file(ref.state_dict(), tmp_path / "model.safetensors")
        return ref, vistok.load(tmp_path)

    return load


def features(seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 77, 768)).astype(np.float32))


def assert_picture(found, expected):
    torch.testing.assert_close(found[..., ::5, ::5], expected.clamp(0, 1), atol=5e-4, rtol=0)


@pytest.mark.parity
def test_vq_model_matches_the_official_ids_losses_and_pixels(official):
    ref, tok = official("ta_titok_vq")
    assert tok.registry_name == "ta_titok"
    x, text = image(1, 256, 6), features(22)
    with torch.no_grad():
        z = tok.encode_features(x)
        quantized = tok.quantizer(z)
    sure = ref["top2_margin"] > 1e-4
    assert torch.equal(quantized.ids[0][sure], ref["ids"][0, 0][sure])
    torch.testing.assert_close(z.transpose(1, 2).unsqueeze(2), ref["z"], atol=2e-4, rtol=0)
    torch.testing.assert_close(quantized.loss, ref["quantizer_loss"], rtol=1e-4, atol=1e-6)
    tokens = tok.encode(x)
    assert_picture(tok.decode(tokens, text=text), ref["image"])
    assert_picture(tok.decode(tokens, text=torch.zeros_like(text)), ref["image_zero_text"])
    ids = torch.from_numpy(np.random.default_rng(11).integers(0, 8192, (1, 1, 32)))[:, 0]
    assert_picture(tok.decode(ids, text=text), ref["random_ids_image"])


@pytest.mark.parity
def test_vae_latents_and_pixels_match(official):
    ref, tok = official("ta_titok")
    x, text = image(1, 256, 5), features(21)
    tokens = tok.encode(x)
    torch.testing.assert_close(tokens.codes.transpose(1, 2).unsqueeze(2), ref["mean"], atol=2e-4, rtol=0)
    with torch.no_grad():
        z = tok.encode_features(x)
    torch.testing.assert_close(tok.quantizer.kl(z), ref["kl"], atol=2e-4, rtol=1e-4)
    assert_picture(tok.decode(tokens, text=text), ref["mode_image"])
    sample = Tokens(ids=None, codes=ref["sample"].squeeze(2).transpose(1, 2))
    assert_picture(tok.decode(sample, text=text), ref["image"])
    assert_picture(tok.decode(sample, text=torch.zeros_like(text)), ref["image_zero_text"])


@pytest.mark.parity
@pytest.mark.parametrize("name", ["ta_titok", "ta_titok_vq"])
def test_single_weight_file_has_the_published_configuration(golden, name):
    ref = golden(name)
    tensors = {k: torch.empty(tuple(s), device="meta") for k, s in ref.meta["state_dict"]}
    assert layout.convert({}, tensors)[:2] == layout.convert(ref.meta["config"], tensors)[:2]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("bl32_vq", 390.8),
        ("bl64_vq", 390.9),
        ("bl128_vq", 391.0),
        ("bl32_vae", 390.2),
        ("bl64_vae", 390.2),
        ("sl128_vae", 330.3),
    ],
)
def test_published_models_have_the_published_size(name, millions):
    found = count_parameters(on_meta("tokenizer", f"ta_titok_{name}.datacomp")) / 1e6
    assert found == pytest.approx(millions, abs=0.16)


def tiny(**kwargs):
    return vistok.create("tokenizer", "ta_titok_tiny", **kwargs).eval()


def test_text_changes_the_picture_but_not_the_ids():
    tok, x = tiny(), image(2, 64)
    red, none = tok.encode(x, text="a red dog"), tok.encode(x)
    assert torch.equal(red.ids, none.ids)
    assert red.text == ("a red dog", "a red dog")
    assert none.text is None
    assert not torch.allclose(tok.decode(red), tok.decode(none), atol=1e-4)


def test_captions_travel_with_the_tokens_and_can_be_replaced():
    tok, x = tiny(), image(2, 64)
    tokens = tok.encode(x, text=["a red dog", "a cat"])
    pictures = tok.decode(tokens)
    torch.testing.assert_close(tok.decode(tokens[1]), pictures[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(tok.decode(tokens.ids, text=["a red dog", "a cat"]), pictures, rtol=0, atol=0)
    torch.testing.assert_close(tok.decode(tokens, text=""), tok.decode(tok.encode(x)), rtol=0, atol=0)


def test_captions_survive_the_container():
    tok = tiny()
    tokens = tok.encode(image(1, 64), text="a blue door")
    again = container.from_bytes(
        container.to_bytes(tokens, tok.model_id), vocab=tok.quantizer.vocab_sizes, model_id=tok.model_id
    )
    assert torch.equal(tok.decode(again), tok.decode(tokens))


def test_every_caption_is_encoded_once():
    tok, x = tiny(), image(2, 64)
    for _ in range(3):
        tok(x, text=["a red dog", "a cat"])
        tok(x, text=["a cat", "a cat"])
        tok(x)
    assert tok.texts.encoded == 3  # two captions and the null text


def test_old_captions_leave_a_full_cache():
    texts = Texts(TextEncoder(kind="words", length=4, dim=16, cache_mb=3 * 4 * 4 * 16 / 2**20))
    first = texts(["one", "two", "three", "four", "five"], torch.device("cpu"))
    again = texts(["five", "one"], torch.device("cpu"))
    assert texts.encoded == 6
    assert torch.equal(again, first[[4, 0]])


def test_features_kept_in_a_folder_are_not_encoded_again(tmp_path):
    spec = TextEncoder(kind="words", length=4, dim=16, cache=str(tmp_path))
    first, second = Texts(spec), Texts(spec)
    made = first(["a cat", "a dog"], torch.device("cpu"))
    assert torch.equal(second(["a dog", "a cat"], torch.device("cpu")), made[[1, 0]])
    assert (first.encoded, second.encoded) == (2, 0)
    longer = Texts(TextEncoder(kind="words", length=5, dim=16, cache=str(tmp_path)))
    assert longer(["a cat"], torch.device("cpu")).shape == (1, 5, 16)


def test_the_text_encoder_is_neither_saved_nor_copied(tmp_path):
    tok = tiny()
    tok(image(1, 64), text="a cat")
    assert not any("texts" in key for key in tok.state_dict())
    assert copy.deepcopy(tok).texts is tok.texts
    tok.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert again.config == tok.config
    tokens = tok.encode(image(1, 64), text="a cat")
    assert torch.equal(again.decode(tokens), tok.decode(tokens))


def test_training_reads_the_captions_of_the_batch_and_drops_a_share():
    tok, x = tiny(), image(4, 64)
    words = ("a", "b", "c", "d")
    batch = Batch(x, torch.arange(4), 0, text=words)
    assert tokenizer_options(tok, batch, 0) == {"text": words}
    assert tokenizer_options(tok, Batch(x, torch.arange(4)), 0) == {"text": None}
    assert tokenizer_options(tok, batch, 0, caption_dropout=1.0) == {"text": ("", "", "", "")}
    drawn = [
        tokenizer_options(tok, Batch(x, torch.arange(4) + 4 * i, 0, text=words), i, caption_dropout=0.5)
        for i in range(20)
    ]
    dropped = sum(text == "" for options in drawn for text in options["text"])
    assert 20 < dropped < 60


def test_training_reaches_every_parameter_of_the_decoder():
    tok = tiny().train()
    out = tok(image(2, 64), text=["a cat", "a dog"])
    (out.images.square().mean() + out.quantized.loss).backward()
    assert [n for n, p in tok.named_parameters() if p.grad is None] == []


def test_order_of_text_tokens_does_not_matter_with_their_positions():
    tok = tiny()
    tokens, text = tok.encode(image(1, 64)), torch.randn(1, 8, 32)
    before = tok.decode(tokens, text=text)
    order = torch.randperm(8)
    with torch.no_grad():
        tok.decoder.text_position.copy_(tok.decoder.text_position[order])
    torch.testing.assert_close(tok.decode(tokens, text=text[:, order]), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t, x: t.encode(x, text=["a", "b", "c"]), ValueError, "2 pictures and 3 captions"),
        (lambda t, x: t.encode(x, text=3), TypeError, "text is a caption, a list of captions, or features"),
        (
            lambda t, x: t.decode(t.encode(x), text=torch.zeros(2, 8, 31)),
            ValueError,
            r"\(B, 8, 32\) .* got \(2, 8, 31\)",
        ),
        (lambda t, x: t.decode(t.encode(x), text=torch.zeros(1, 8, 32)), ValueError, r"\(2, L, D\), one row of tokens"),
        (lambda t, x: t.decode(t.encode(x), steps=3), ValueError, "no option 'steps'; it has text"),
    ],
)
def test_misuse_is_one_clear_line(call, error, message):
    with pytest.raises(error, match=message):
        call(tiny(), image(2, 64))


def test_encoding_needs_no_text_encoder_and_decoding_says_what_is_missing():
    tok = tiny(text_encoder={"kind": "clip", "model": "local-dir:/nowhere", "pretrained": None})
    tokens = tok.encode(image(1, 64), text="a cat")
    with pytest.raises(LoadError, match=r"local-dir:/nowhere cannot be loaded: .* features \(B, 8, 32\) as `text`"):
        tok.decode(tokens)
    assert tok.decode(tokens, text=torch.zeros(1, 8, 32)).shape == (1, 3, 64, 64)


# -- real text encoders, tiny ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a random CLIP as open_clip publishes it: text tower of 2 layers, 32 wide."""
    import open_clip

    torch.manual_seed(0)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    model = open_clip.CLIP(**config)
    folder = tmp_path_factory.mktemp("clip")
    pre = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pre}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder, model.eval()


def test_clip_features_are_those_of_the_last_norm_before_pooling(clip):
    folder, model = clip
    texts = Texts(TextEncoder(kind="clip", model=f"local-dir:{folder}", length=12, dim=32))
    captions = ["a photo of a dog", ""]
    found = texts(captions, torch.device("cpu"))
    assert found.shape == (2, 12, 32)
    import open_clip

    ids = open_clip.tokenize(captions, context_length=12)
    with torch.no_grad():
        end = found[torch.arange(2), ids.argmax(-1)]  # the public feature: end-of-text position, projected
        torch.testing.assert_close(end @ model.text_projection, model.encode_text(ids), atol=1e-5, rtol=0)


def test_tokenizer_decodes_with_a_real_clip(clip):
    tok = tiny(text_encoder={"kind": "clip", "model": f"local-dir:{clip[0]}", "length": 12, "dim": 32})
    x = image(1, 64)
    assert not torch.allclose(tok.decode(tok.encode(x, text="a dog")), tok.decode(tok.encode(x)), atol=1e-5)


def test_features_of_another_width_are_refused(clip):
    tok = tiny(text_encoder={"kind": "clip", "model": f"local-dir:{clip[0]}", "length": 12, "dim": 16})
    with pytest.raises(LoadError, match=r"features \(12, 32\) per caption, .* built for \(12, 16\)"):
        tok.decode(tok.encode(image(1, 64)))
