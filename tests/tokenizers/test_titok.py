"""TiTok and MaskGIT-VQGAN against the official implementation, and what follows from their definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.conftest import PHOTOS
from tests.fill import fill, image
from vistok.hub import LoadError, count_parameters, on_meta
from vistok.image import Preprocess
from vistok.tokenizers.official import titok as layout
from vistok.tokens import Tokens


@pytest.fixture
def official(golden, tmp_path):
    """Writes a golden file as the official project would have published it, and loads it."""

    def load(name, **kwargs):
        ref = golden(name)
        (tmp_path / "config.json").write_text(json.dumps(ref.meta["config"]))
        save_file(ref.state_dict(), tmp_path / "model.safetensors")
        return ref, vistok.load(tmp_path, **kwargs)

    return load


def assert_stats(images, stats, atol=5e-4):
    found = [images.mean(), images.std(correction=0), images.min(), images.max()]
    np.testing.assert_allclose([float(x) for x in found], stats.numpy(), atol=atol)


def check_vq(ref, tok, seed):
    x = image(1, 256, seed)
    with torch.no_grad():
        z = tok.encode_features(x)
        quantized = tok.quantizer(z)
        sure = ref["top2_margin"] > 1e-4
        assert torch.equal(quantized.ids[0][sure], ref["ids"][0, 0][sure])
        torch.testing.assert_close(z.transpose(1, 2).unsqueeze(2), ref["z"], atol=2e-4, rtol=0)
        torch.testing.assert_close(quantized.codes.transpose(1, 2).unsqueeze(2), ref["zq"], atol=2e-4, rtol=0)
        torch.testing.assert_close(0.25 * quantized.losses["commitment"], ref["commitment_loss"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(quantized.losses["codebook"], ref["codebook_loss"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(quantized.loss, ref["quantizer_loss"], rtol=1e-4, atol=1e-6)
        full = tok.decode_codes(quantized.codes)
        torch.testing.assert_close(full[..., ::5, ::5], ref["image"], atol=5e-4, rtol=0)
        assert_stats(full, ref["image_stat"])
        ids = torch.from_numpy(
            np.random.default_rng(11).integers(0, tok.quantizer.vocab_sizes[0], (1, 1, tok.num_tokens))
        )[:, 0]
        rebuilt = tok.decode(ids)
        torch.testing.assert_close(rebuilt[..., ::5, ::5], ref["random_ids_image"].clamp(0, 1), atol=5e-4, rtol=0)


@pytest.mark.parity
def test_two_stage_s128_matches_the_official_ids_losses_and_pixels(official):
    ref, tok = official("titok_s128")
    check_vq(ref, tok, seed=0)


@pytest.mark.parity
def test_two_stage_logits_and_soft_codes_match(official):
    ref, tok = official("titok_s128")
    with torch.no_grad():
        logits = tok(image(1, 256, 0), pixels=False).extras["logits"]
    grid = logits.transpose(1, 2).unflatten(2, (16, 16))
    sure = ref["decoder_logits_argmax_margin"] > 1e-3
    assert torch.equal(grid.argmax(1)[sure], ref["decoder_logits_argmax"][sure])
    torch.testing.assert_close(grid[:, ::16, ::3, ::3], ref["decoder_logits"], atol=2e-4, rtol=0)
    soft = (logits.softmax(-1) @ tok.pixel_codebook.weight).transpose(1, 2).unflatten(2, (16, 16))
    torch.testing.assert_close(soft[:, ::16, ::5, ::5], ref["soft_code"], atol=2e-6, rtol=0)


@pytest.mark.parity
def test_single_stage_vq8k_matches_the_official_ids_losses_and_pixels(official):
    ref, tok = official("titok_vq8k")
    check_vq(ref, tok, seed=6)


@pytest.mark.parity
def test_vae_latents_and_pixels_match(official):
    ref, tok = official("titok_vae")
    x = image(2, 256, 3)
    with torch.no_grad():
        z = tok.encode_features(x).transpose(1, 2).unsqueeze(2)
        torch.testing.assert_close(z, ref["z"], atol=2e-4, rtol=0)
        tokens = tok.encode(x)
        assert tokens.ids is None
        torch.testing.assert_close(tokens.codes.transpose(1, 2).unsqueeze(2), ref["mean"], atol=2e-4, rtol=0)
        mode = tok.decode_codes(tokens.codes)
        torch.testing.assert_close(mode[..., ::6, ::6], ref["mode_image"], atol=5e-4, rtol=0)
        sample = ref["sample"].squeeze(2).transpose(1, 2)
        rebuilt = tok.decode_codes(sample)
        torch.testing.assert_close(rebuilt[..., ::6, ::6], ref["image"], atol=5e-4, rtol=0)
        noise = torch.from_numpy(np.random.default_rng(77).standard_normal((2, 16, 1, 64)).astype(np.float32))
        mean, logvar = tok.encode_features(x).chunk(2, dim=-1)
        drawn = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise.squeeze(2).transpose(1, 2)
        torch.testing.assert_close(drawn, sample, atol=2e-4, rtol=0)


@pytest.mark.parity
def test_maskgit_vqgan_matches_the_official_ids_and_pixels(golden, tmp_path):
    ref = golden("maskgit_vqgan")
    save_file(ref.state_dict(), tmp_path / "maskgit.safetensors")
    tok = vistok.load(tmp_path / "maskgit.safetensors")
    x = image(1, 128, 71)
    with torch.no_grad():
        h = tok.encode_features(x).transpose(1, 2).unflatten(2, (8, 8))
        torch.testing.assert_close(h[:, ::8, ::2, ::2], ref["h"], atol=2e-4, rtol=0)
        ids = tok.tokenize(x)[0].ids
        sure = ref["proxy_margin"] > 1e-4
        assert torch.equal(ids[0][sure], ref["proxy_ids"][0][sure])
        codes = torch.from_numpy(np.random.default_rng(72).integers(0, 1024, (1, 8, 8)))
        assert torch.equal(codes, ref["codes"])
        rebuilt = tok.decode_codes(tok.quantizer.ids_to_codes(codes.flatten(1)), grid=(8, 8))
        torch.testing.assert_close(rebuilt[..., ::3, ::3], ref["image"], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("titok_l32.in1k", 641.1),
        ("titok_b64.in1k", 204.8),
        ("titok_s128.in1k", 83.7),
        ("titok_bl64_vq8k.in1k", 390.0),
        ("titok_bl128_vq8k.in1k", 390.2),
        ("titok_sl256_vq8k.in1k", 330.3),
        ("titok_ll32_vae_c16.in1k", 606.9),
        ("titok_bl64_vae_c16.in1k", 389.4),
        ("titok_bl128_vae_c16.in1k", 389.6),
    ],
)
def test_published_models_have_the_published_size(name, millions):
    assert count_parameters(on_meta("tokenizer", name)) / 1e6 == pytest.approx(millions, abs=0.1)


TINY = ["titok_tiny", "titok_two_stage_tiny", "maskgit_vqgan_tiny"]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_decode_to_the_same_pictures_as_ids(name, batch):
    tok = vistok.create("tokenizer", name).eval()
    tokens = tok.encode(image(batch, 64))
    assert tokens.ids.shape == (batch, tok.num_tokens)
    assert tokens.ids.dtype == torch.int64
    pictures = tok.decode(tokens)
    assert pictures.shape == (batch, 3, 64, 64)
    torch.testing.assert_close(tok.decode(tokens.ids), pictures, rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_saved_and_loaded_tokenizer_is_bit_identical(name, tmp_path):
    tok = vistok.create("tokenizer", name).eval()
    tok.save_pretrained(tmp_path)
    again = vistok.load(tmp_path)
    assert again.config == tok.config
    assert again.model_id == tok.model_id
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tok.state_dict().items())
    x = image(1, 64)
    assert torch.equal(tok.decode(tok.encode(x)), again.decode(again.encode(x)))


def test_training_reaches_every_parameter():
    tok = vistok.create("tokenizer", "titok_tiny")
    out = tok(image(2, 64))
    (out.images.square().mean() + out.quantized.loss).backward()
    assert [n for n, p in tok.named_parameters() if p.grad is None] == []


def test_half_precision_file_keeps_the_model_id(tmp_path):
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    name = tok.model_id
    tok.save_pretrained(tmp_path)
    half = {k: v.half() if v.is_floating_point() else v for k, v in tok.state_dict().items()}
    save_file(half, tmp_path / "model.safetensors")
    assert vistok.load(tmp_path).model_id == name


def test_training_changes_the_model_id():
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    before = tok.model_id
    tok.train()
    with torch.no_grad():
        tok.encoder.latents.add_(1)
    assert tok.eval().model_id != before


def test_decoder_weights_do_not_change_the_model_id():
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    before = tok.model_id
    tok.train()
    with torch.no_grad():
        tok.decoder.mask_token.add_(1)
        tok.head.smooth.bias.add_(1)
    assert tok.eval().model_id == before


def test_ids_survive_bf16_autocast_in_front_of_the_quantizer():
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tok.encode_features(image(1, 64)).dtype == torch.float32


def test_whole_model_in_bf16_encodes_and_decodes():
    tok = vistok.create("tokenizer", "titok_two_stage_tiny").to(torch.bfloat16).eval()
    pictures = tok.decode(tok.encode(image(1, 64)))
    assert pictures.dtype == torch.float32
    assert pictures.isfinite().all()


def test_gradient_checkpointing_changes_nothing():
    tok = vistok.create("tokenizer", "titok_tiny")
    x = image(2, 64)

    def gradients(checkpointing):
        tok.encoder.transformer.gradient_checkpointing = tok.decoder.transformer.gradient_checkpointing = checkpointing
        tok.zero_grad()
        tok(x).images.square().mean().backward()
        return [p.grad.clone() for p in tok.parameters() if p.grad is not None]

    for plain, checked in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(plain, checked)


def test_resized_model_takes_wide_pictures_without_transposing():
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    ramp = torch.arange(64.0).view(8, 8)
    with torch.no_grad():
        for part in (tok.encoder, tok.decoder):
            part.position[1:] = ramp.flatten().unsqueeze(1)  # position value = 8 * row + column
    wide = tok.resized((64, 128))
    table = wide.encoder.position.detach()[1:, 0].view(8, 16)
    assert torch.all(table[:, 1:] >= table[:, :-1] - 1e-3)  # grows along columns ...
    assert float((table[1:] - table[:-1]).mean()) == pytest.approx(8, abs=0.2)  # ... and by 8 per row
    assert float((table[:, 1:] - table[:, :-1]).mean()) == pytest.approx(0.47, abs=0.1)
    x = torch.rand(1, 3, 64, 128)
    assert wide.decode(wide.encode(x)).shape == (1, 3, 64, 128)
    assert tok.preprocess.size == (64, 64)


def test_resizing_to_the_trained_size_changes_nothing():
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    x = image(1, 64)
    assert torch.equal(tok.resized((64, 64)).encode(x).ids, tok.encode(x).ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode(torch.rand(1, 3, 32, 32)), "takes 64x64 and got a tensor of 32x32"),
        (lambda t: t.encode(torch.rand(1, 3, 64, 64) * 255), r"span \[.*Scale them"),
        (lambda t: t.encode(torch.rand(1, 3, 64, 64), num_tokens=4), "always makes 16 tokens"),
        (lambda t: t.encode(torch.rand(1, 3, 64, 64), num_tokens=17), "num_tokens is 1..16"),
        (lambda t: t.encode(torch.rand(1, 3, 64, 64), text=["a cat"]), "no option 'text'"),
        (lambda t: t.encode([]), "list of pictures is empty"),
        (lambda t: t.decode(torch.full((1, 16), 256)), "0..255, got 256..256"),
        (lambda t: t.decode(torch.full((1, 16), -1)), "0..255, got -1..-1"),
        (lambda t: t.decode(torch.zeros(1, 8, dtype=torch.int64)), "exactly 16 tokens"),
        (lambda t: t.decode(torch.zeros(1, 16)), "Ids are integers"),
        (lambda t: t.decode(torch.zeros(1, 16, dtype=torch.int64), steps=4), "no option 'steps'"),
        (lambda t: t.decode(torch.zeros(0, 16, dtype=torch.int64)), "batch is empty"),
    ],
)
def test_misuse_is_one_clear_line(call, message):
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    with pytest.raises(ValueError, match=message):
        call(tok)


def test_encode_takes_paths_pictures_and_tensors_alike(photos):
    from PIL import Image

    tok = vistok.create("tokenizer", "titok_tiny").eval()
    path = photos[1]
    ids = tok.encode(path).ids
    assert torch.equal(tok.encode(Image.open(path)).ids, ids)
    assert torch.equal(tok.encode([str(path)]).ids, ids)
    assert torch.equal(tok.encode(tok.preprocess(path)).ids, ids)


def test_continuous_latents_have_no_ids_and_decode_from_codes():
    tok = vistok.create("tokenizer", "titok_tiny", quantizer={"name": "gaussian", "dim": 8}).eval()
    tokens = tok.encode(image(1, 64))
    assert tokens.ids is None and tokens.vocab == ()
    assert tok.decode(Tokens(ids=None, codes=tokens.codes)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="no ids"):
        tok.decode(torch.zeros(1, 16, dtype=torch.int64))


def test_continuous_latents_are_drawn_on_request():
    tok = vistok.create("tokenizer", "titok_tiny", quantizer={"name": "gaussian", "dim": 8}).eval()
    picture = image(1, 64)
    assert torch.equal(tok.encode(picture).codes, tok.encode(picture).codes)
    torch.manual_seed(0)
    drawn = tok.encode(picture, sample=True).codes
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(drawn, tok.quantizer.draw(tok.encode_features(picture)))


def test_continuous_latents_are_the_mean_in_training_mode_too():
    tok = vistok.create("tokenizer", "titok_tiny", quantizer={"name": "gaussian", "dim": 8}).train()
    picture = image(1, 64)
    assert torch.equal(tok.encode(picture).codes, tok.encode(picture).codes)


def test_ids_cannot_be_drawn():
    with pytest.raises(ValueError, match="no option 'sample'"):
        vistok.create("tokenizer", "titok_tiny").eval().encode(image(1, 64), sample=True)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1, 2], TypeError, "Tokens or a tensor of ids, got list"),
        (Tokens(ids=None, codes=torch.zeros(1, 16, 3)), ValueError, "codes of 8 channels, got 3"),
    ],
)
def test_what_cannot_be_decoded_is_said(given, error, message):
    with pytest.raises(error, match=message):
        vistok.create("tokenizer", "titok_tiny").eval().decode(given)


def test_convolutional_models_take_another_size():
    tok = vistok.create("tokenizer", "maskgit_vqgan_tiny").eval()
    other, picture = tok.resized((32, 64)), image(1, 64)[..., :32, :]
    assert other.encode(picture).grid == (2, 4)
    with torch.no_grad():
        assert torch.equal(other.encode(picture).ids, tok.tokenize(picture)[0].ids)


def test_another_size_keeps_precision_and_preprocessing():
    tok = vistok.create("tokenizer", "titok_tiny").eval().to(torch.bfloat16)
    tok.preprocess = Preprocess(size=(64, 64), crop="squash")
    other = tok.resized((32, 64))
    assert other.preprocess == Preprocess(size=(32, 64), crop="squash")
    assert other.decoder.position.dtype == torch.bfloat16


@pytest.mark.parity
def test_single_weight_file_is_the_same_model_as_the_folder(official, tmp_path):
    ref, folder = official("titok_vae")
    torch.save(ref.state_dict(), tmp_path / "tokenizer.bin")
    file = vistok.load(tmp_path / "tokenizer.bin")
    assert file.config == folder.config
    assert file.model_id == folder.model_id


@pytest.mark.parity
@pytest.mark.parametrize("name", ["titok_s128", "titok_vae", "titok_vq8k"])
def test_single_weight_file_has_the_published_configuration(golden, name):
    ref = golden(name)
    tensors = {k: torch.empty(tuple(s), device="meta") for k, s in ref.meta["state_dict"]}
    assert layout.recognises({}, tensors)
    assert layout.convert({}, tensors)[:2] == layout.convert(ref.meta["config"], tensors)[:2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "x"}, "in no format vistok knows"),
        ({"model": None}, "in no format vistok knows"),
        ({"model": {"vq_model": {"num_latent_tokens": 4}}}, "looks like TiTok .* incomplete or altered: KeyError"),
    ],
)
def test_altered_official_checkpoint_is_one_clear_error(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"latent_tokens": torch.zeros(4, 8), "encoder.conv_out.weight": torch.zeros(4, 8, 1, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=message):
        vistok.load(tmp_path)


def test_checkpoint_of_another_shape_lists_what_does_not_fit(tmp_path):
    vistok.create("tokenizer", "titok_tiny").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["num_tokens"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"wrong shape 3 .*\(16, 64\) for \(8, 64\)"):
        vistok.load(tmp_path)


def test_stage_one_checkpoint_is_refused_by_name(golden, tmp_path):
    ref = golden("titok_s128")
    stage_one = {k: v for k, v in ref.state_dict().items() if not k.startswith("pixel_")}
    (tmp_path / "config.json").write_text(json.dumps(ref.meta["config"]))
    save_file(stage_one, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="stage-1"):
        vistok.load(tmp_path)


def test_training_checkpoint_with_usage_statistics_loads(golden, tmp_path):
    ref = golden("titok_vae")
    config = ref.meta["config"] | {}
    state = ref.state_dict()
    config["model"]["vq_model"] |= {"quantize_mode": "vq", "clustering_vq": True, "codebook_size": 32, "token_size": 32}
    state["quantize.embedding.weight"] = torch.from_numpy(fill("quantize.embedding.weight", (32, 32)))
    state["quantize.embed_prob"] = torch.zeros(32)
    state["decoder.decoder_embed.weight"] = torch.from_numpy(fill("decoder.decoder_embed.weight", (512, 32)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    assert vistok.load(tmp_path).quantizer.registry_name == "cvq"


def test_photographs_are_there():
    assert len(list(PHOTOS.glob("*.jpg"))) == 42
