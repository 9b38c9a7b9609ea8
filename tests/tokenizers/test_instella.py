"""Instella's binary auto-encoder against the official implementation, and what follows from its definition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.fill import fill, image
from vistok.hub import LoadError, count_parameters, on_meta
from vistok.quantizers.base import Positions
from vistok.tokenizers.instella_net import rotary_table

CASES = [("scale_None", None), ("scale_128", 128)]


def weights(keys) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.asarray(fill(k, tuple(s)))) for k, s in keys}


@pytest.fixture
def official(golden, tmp_path):
    """Writes a checkpoint as the project has it and loads it."""

    def load(scale, extra=(), **config):
        ref = golden("instella_small")
        (tmp_path / "config.json").write_text(json.dumps(ref.meta["bae_config"] | {"bae_scale": scale} | config))
        save_file(weights([*ref.meta["bae_state_dict"], *extra]), tmp_path / "model.safetensors")
        return ref, vistok.load(tmp_path)

    return load


@pytest.mark.parity
@pytest.mark.parametrize(("name", "scale"), CASES)
def test_logits_bits_and_pixels_match_the_official_ones(official, name, scale):
    ref, tok = official(scale)
    picture = image(2, 64, 5)
    with torch.no_grad():
        features = tok.encode_features(picture)
        logits = tok.quantizer.logits(features)
    torch.testing.assert_close(features, ref[f"{name}/encoder_out"], atol=2e-4, rtol=0)
    torch.testing.assert_close(logits, ref[f"{name}/logits"], atol=2e-4, rtol=0)
    tokens = tok.encode(picture)
    assert torch.equal(tok.quantizer.ids_to_bits(tokens.ids).long(), ref[f"{name}/bits"])
    pictures = tok.decode(tokens)
    expected = (0.5 * ref[f"{name}/rec_stride"] + 0.5).clamp(0, 1)
    torch.testing.assert_close(pictures[:, :, ::2, 1::2], expected, atol=2.5e-4, rtol=0)
    quantized = tok.quantizer(features)
    torch.testing.assert_close(quantized.codes[:, :4], ref[f"{name}/z_q"], atol=2e-4, rtol=0)
    torch.testing.assert_close(quantized.losses["saturation"], ref[f"{name}/code_loss"], atol=1e-5, rtol=0)


@pytest.mark.parity
def test_training_pass_and_aligned_features_match(official, golden):
    case = golden("instella_small").meta["cases"]["train_repa"]
    ref, tok = official(None, case["extra_keys"], **case["config"])
    assert tok.quantizer.train_temperature == 0.5 and tok.repa_dim == 20
    tok.train()
    with torch.no_grad():
        z = tok.encode_features(image(2, 64, 5))
        drawn = tok.quantizer.from_uniform(z, Positions(z, None, synced=False), ref["train_repa/u"])
        pictures, inner = tok._decode(drawn.codes, (64, 64))
        repa = tok.decoder.repa(inner)
    assert repa.shape == (2, 2, 2, 20)
    torch.testing.assert_close(repa.flatten(1, 2), ref["train_repa/repa_feature"], atol=5e-4, rtol=0)
    rec = ref["train_repa/rec_stride"]
    step = 64 // rec.shape[-1]
    strided = [2 * pictures[:, :, i::step, j::step] - 1 for i in range(step) for j in range(step)]
    assert min(float((s - rec).abs().max()) for s in strided) < 5e-4


@pytest.mark.parity
def test_configuration_may_be_a_python_file_of_assignments(official, golden, tmp_path):
    ref, tok = official(None)
    (tmp_path / "config.json").unlink()
    lines = ["import os", "boom = os.system('touch executed')", "num_latent_tkns=256"]
    lines += [f"{key}={value!r}" for key, value in ref.meta["bae_config"].items()]
    (tmp_path / "bae_config.py").write_text("\n".join(lines))
    found = vistok.load(tmp_path)
    assert found.config == tok.config | {"scale": 1024}  # the scripts' default
    assert not (tmp_path / "executed").exists()


def test_published_model_has_the_published_size():
    model = on_meta("tokenizer", "instella_1024.laion")
    assert count_parameters(model) == 427_754_560
    assert count_parameters(model.encoder) == 119_855_616
    assert model.num_tokens * model.quantizer.bits == 8192 and len(model.quantizer.vocab_sizes) == 8


@pytest.fixture
def tok():
    return vistok.create("tokenizer", "instella_tiny").eval()


def test_tokens_of_one_size_decode_to_another(tok):
    tokens = tok.encode(image(2, 64))
    assert tokens.grid is None and tokens.ids.shape == (2, 16)
    assert tok.decode(tokens).shape == (2, 3, 64, 64)
    assert tok.decode(tokens, size=(128, 48)).shape == (2, 3, 128, 48)
    assert torch.equal(tok.decode(tokens.ids, size=(128, 48)), tok.decode(tokens, size=(128, 48)))


@pytest.mark.slow
def test_a_thousand_pixels_are_as_many_tokens_as_sixty_four(tok):
    tokens = tok.encode(torch.rand(1, 3, 1024, 1024))
    assert tokens.ids.shape == (1, 16)
    assert tok.decode(tokens).shape == (1, 3, 1024, 1024)


def test_positions_span_the_same_range_for_every_size():
    small, _ = rotary_table(0, (2, 2), 8, (2, 2, 2))
    large, _ = rotary_table(0, (5, 5), 8, (2, 2, 2))
    assert torch.equal(small[-1], large[-1]) and torch.equal(small[0], large[0])
    counted, _ = rotary_table(0, (5, 5), None, (2, 2, 2))
    assert not torch.equal(counted[-1], large[-1])


def test_a_side_of_one_token_has_position_zero(tok):
    assert tok.decode(tok.encode(torch.rand(1, 3, 16, 16))).isfinite().all()


def test_bytes_are_ids_above_63_bits():
    spec = {"name": "binary", "dim": 64, "num_bits": 64}
    wide = vistok.create("tokenizer", "instella_tiny", quantizer=spec).eval()
    tokens = wide.encode(image(1, 64))
    assert tokens.ids.shape == (1, 16, 8) and tokens.vocab == (256,) * 8
    assert torch.equal(wide.decode(tokens.ids), wide.decode(tokens))


def test_training_reaches_every_parameter_and_follows_the_generator():
    tok = vistok.create("tokenizer", "instella_tiny", repa_dim=12)
    out = tok(image(2, 64), generator=torch.Generator().manual_seed(3))
    again = tok(image(2, 64), generator=torch.Generator().manual_seed(3))
    assert torch.equal(out.images, again.images)
    (out.images.square().mean() + out.quantized.loss + out.extras["repa"].square().mean()).backward()
    assert [n for n, p in tok.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_changes_nothing(tok):
    def gradients(on):
        tok.encoder.transformer.gradient_checkpointing = tok.decoder.transformer.gradient_checkpointing = on
        tok.train().zero_grad()
        tok(image(1, 64), generator=torch.Generator().manual_seed(0)).images.square().mean().backward()
        return [p.grad.clone() for p in tok.parameters()]

    for plain, checked in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(plain, checked)


def test_half_precision_encodes_and_decodes(tok):
    tok = tok.to(torch.bfloat16)
    assert tok.encode_features(image(1, 64)).dtype == torch.float32
    assert tok.decode(tok.encode(image(1, 64))).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": (8, 12, 8)}, "axes sum to the 32 channels"),
        ({"scale": 8}, "scale at least four patches"),
        ({"quantizer": {"name": "multiscale", "codebook_size": 8, "dim": 4, "scales": [1, 4]}}, "needs a grid"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        vistok.create("tokenizer", "instella_tiny", **change)


def test_generators_of_the_project_are_no_tokenizers(tmp_path):
    torch.save(
        {"module": {"split_token": torch.zeros(1, 1, 8), "x_embedder.weight": torch.zeros(8, 4)}}, tmp_path / "ar.pt"
    )
    with pytest.raises(LoadError, match="in no format vistok knows"):
        vistok.load(tmp_path / "ar.pt")
