"""AURORA's depth VQ-VAE against the official implementation, and what follows from its definition."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

import vistok
from tests.fill import image
from vistok.data.augment import Augment
from vistok.hub import LoadError
from vistok.image import to_pil, to_tensor
from vistok.tokenizers.depth_vqvae import value_at


@pytest.fixture
def official(golden, tmp_path):
    """The golden weights as the official project saves them: under `weights`, with the prefix of DDP."""
    ref = golden("aurora_vqvae")
    state = {k: v * 1.5 if v.ndim == 4 else v for k, v in ref.state_dict().items()}
    state["encoder.12.bias"] = ref["enc_last_bias"]
    state["_vq_vae._ema_cluster_size"] = torch.ones(128)
    state["_vq_vae._ema_w"] = state["_vq_vae._embedding"].clone()
    torch.save({"weights": {f"module.{k}": v for k, v in state.items()}, "epoch": 20}, tmp_path / "depth.pt")
    return ref, vistok.load(tmp_path / "depth.pt")


@pytest.mark.parity
def test_ids_and_maps_match_the_official_ones(official):
    ref, tok = official
    x = image(2, 320, 0)
    tokens = tok.encode(x)
    assert tokens.grid == (10, 10)
    sure = ref["margin"].flatten(1) > 1e-3
    assert torch.equal(tokens.ids[sure], ref["ids"].flatten(1)[sure])
    with torch.no_grad():
        # in float64, which the file meets to 7e-6: float32 of a CPU without AVX-512 is 1.4e-5 off
        z = copy.deepcopy(tok).double().encode_features(x.double()).transpose(1, 2).unflatten(2, (10, 10))
        torch.testing.assert_close(z[:, ::16].float(), ref["z_sample"], rtol=1e-4, atol=1e-5)
        codes = tok.tokens_to_codes(ref["ids"].flatten(1))
        rebuilt = tok.decode_codes(codes)
    torch.testing.assert_close(2 * rebuilt[:, :1, ::4, ::4] - 1, ref["recon"], rtol=1e-4, atol=1e-5)
    clamped = tok.decode_map(ref["ids"].flatten(1))
    torch.testing.assert_close(clamped, rebuilt[:, :1].clamp(0, 1))


@pytest.mark.parity
def test_losses_gradients_and_the_codebook_after_a_step_match(official):
    ref, tok = official
    x = image(2, 320, 0)
    target = x[:, :1].expand(-1, 3, -1, -1)

    def loss():
        out = tok(x)
        squared = 4 * (out.images - target).square().mean()  # officially on [-1, 1]
        return out, squared, squared + out.quantized.loss

    with torch.no_grad():
        out, squared, total = loss()
        torch.testing.assert_close(torch.stack([total, squared]).double(), ref["losses_eval"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(2 * out.images[:, :1, ::4, ::4] - 1, ref["recon_ste"], rtol=1e-4, atol=1e-5)
    tok.train()
    _, squared, total = loss()
    total.backward()
    torch.testing.assert_close(torch.stack([total, squared]).detach().double(), ref["losses_train"], rtol=1e-4, atol=0)
    torch.testing.assert_close(tok.quantizer.cluster_size, ref["ema_cluster_size"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tok.quantizer.codebook[:, ::8], ref["ema_embedding_sample"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tok.encoder[0].weight.grad, ref["grad_enc0"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(tok.decoder[-1].weight.grad, ref["grad_dec_last"], rtol=1e-3, atol=1e-6)


@pytest.mark.parity
def test_a_checkpoint_of_other_blocks_is_refused_by_its_keys(official, tmp_path):
    state = torch.load(tmp_path / "depth.pt")["weights"]
    del state["module.decoder.3.net.4.bias"]
    torch.save({"weights": state}, tmp_path / "cut.pt")
    with pytest.raises(LoadError, match=r"missing 1 \(decoder.3.net.4.bias\)"):
        vistok.load(tmp_path / "cut.pt")


@pytest.mark.parametrize("residual", ["v1", "v2"])
@pytest.mark.parametrize(("size", "ratio"), [((64, 64), 32), ((32, 96), 16), ((8, 4), 2)])
def test_any_size_divisible_by_the_ratio_has_a_token_per_cell(residual, size, ratio):
    quantizer = {"name": "vq", "codebook_size": 16, "dim": 4}
    tok = vistok.create(
        "tokenizer",
        "depth_vqvae",
        image_size=size,
        downsample_ratio=ratio,
        hidden_dim=4,
        residual=residual,
        quantizer=quantizer,
    ).eval()
    tokens = tok.encode(torch.rand(3, 3, *size))
    assert tokens.grid == (size[0] // ratio, size[1] // ratio)
    assert tok.decode(tokens).shape == (3, 3, *size)


def test_only_the_first_channel_is_read_and_all_three_are_written():
    tok = vistok.create("tokenizer", "depth_vqvae_tiny").eval()
    x = torch.rand(1, 3, 64, 64)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    tokens = tok.encode(x)
    assert torch.equal(tokens.ids, tok.encode(grey).ids)
    rebuilt = tok.decode(tokens)
    assert torch.equal(rebuilt[:, 0], rebuilt[:, 2])


def test_pictures_are_read_as_grey_maps(photos):
    tok = vistok.create("tokenizer", "depth_vqvae_tiny").eval()
    read = to_tensor(photos[0], tok.preprocess)
    assert torch.equal(read[:, 0], read[:, 2])
    coloured = to_tensor(photos[0], dataclasses.replace(tok.preprocess, channels=3))
    assert torch.equal(read[:, 0], coloured[:, 0])
    augment = Augment(size=(64, 64), crop="squash", flip=0.0, resample="nearest", channels=1)
    trained_on = augment(to_pil(photos[0]), np.random.default_rng(0))
    assert np.array_equal(trained_on, (read[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_certain_soft_tokens_are_hard_tokens():
    tok = vistok.create("tokenizer", "depth_vqvae_tiny").eval()
    ids = torch.randint(64, (2, 64))
    soft = torch.nn.functional.one_hot(ids, 64).float()
    torch.testing.assert_close(tok.decode_soft(soft), tok.decode_map(ids), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"Soft tokens are \(B, N, 64\), got \(2, 64, 63\)"):
        tok.decode_soft(soft[..., 1:])


def test_depth_at_a_point_is_that_of_the_pixel_under_it():
    depth = torch.arange(320 * 320, dtype=torch.float32).view(1, 1, 320, 320)
    assert value_at(depth, 0, 0) == 0
    assert value_at(depth, 335, 0) == 319
    assert value_at(depth, 0, 335) == 319 * 320
    with pytest.raises(ValueError, match="outside the frame of 336"):
        value_at(depth, 336, 0)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"downsample_ratio": 12}, "power of two"), ({"image_size": 50}, "50x50")]
)
def test_sizes_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        vistok.create("tokenizer", "depth_vqvae", quantizer={"name": "fsq", "levels": [4, 4]}, **wrong)
