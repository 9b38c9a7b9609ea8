"""The local start: tokens read and write their own places, and short runs learn."""

from __future__ import annotations

import pytest
import torch

import vistok
from vistok.layers.local_start import places

SIZE = {"width": 64, "depth": 2, "heads": 2}
SHARED = {"image_size": 32, "num_tokens": 16, "encoder": SIZE, "decoder": SIZE}
FSQ = {"name": "fsq", "levels": [8, 8, 8, 5, 5, 5]}
WORDS = {"kind": "words", "length": 4, "dim": 16}
MODELS = {
    "titok": {"patch_size": 8},
    "ta_titok": {"patch_size": 8, "text_encoder": WORDS},
    "textok": {"patch_size": 8, "text_encoder": WORDS},
    "gigatok": {"channels": 32, "multipliers": (1, 1, 1, 1), "inner": 64, "semantic_dim": None},
}


def build(name: str, start: str, **more: object):
    torch.manual_seed(0)
    return vistok.create("tokenizer", name, quantizer=FSQ, start=start, **SHARED, **MODELS[name], **more).eval()


def moved(model) -> torch.Tensor:
    """How far every token moves where one patch changes, in units of the largest move: (patches, tokens)."""
    torch.manual_seed(1)
    picture = torch.rand(1, 3, 32, 32)
    changed = picture.repeat(16, 1, 1, 1)
    for i in range(16):
        row, column = i // 4 * 8, i % 4 * 8
        changed[i, :, row : row + 8, column : column + 8] = torch.rand(3, 8, 8)
    with torch.no_grad():
        far = (model.encode_features(changed) - model.encode_features(picture)).norm(dim=-1)
    return far / far.max()


@pytest.mark.parametrize("name", ["titok", "ta_titok", "textok"])
def test_every_patch_has_a_token_that_reads_it(name):
    far = moved(build(name, "local"))
    best = far.argmax(1)
    assert sorted(best.tolist()) == list(range(16))  # each patch one of its own
    others = (far.sum(1) - far.max(1).values) / 15
    assert (far.max(1).values > 4 * others).all()


@pytest.mark.parametrize("name", MODELS)
def test_features_tell_pictures_apart_more_than_tokens(name):
    shares = {}
    for start in ("published", "local"):
        torch.manual_seed(3)
        with torch.no_grad():
            features = build(name, start).encode_features(
                torch.rand(32, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
            )
        shares[start] = float(features.var(0).mean() / features.square().mean())
    assert shares["local"] > 0.3 > 3 * shares["published"]


@pytest.mark.parametrize("name", ["titok", "ta_titok", "textok"])
def test_short_runs_learn_more_from_there(name):
    errors = {}
    for start in ("published", "local"):
        model = build(name, start).train()
        torch.manual_seed(2)
        cells = torch.rand(64, 3, 4, 4)
        pictures = torch.nn.functional.interpolate(cells, scale_factor=8, mode="bilinear")
        optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
        for step in range(60):
            batch = pictures[step * 16 % 64 :][:16]
            loss = (model(batch).images - batch).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        errors[start] = loss.item()
    assert errors["local"] < 0.6 * errors["published"]


@pytest.mark.parametrize(("patches", "tokens"), [(16, 16), (64, 16), (16, 64), (9, 4), (1, 3)])
def test_places_are_shared_out_among_all(patches, tokens):
    where, own = places(patches, tokens, 256)
    assert where.shape == (patches, 256) and own.shape == (tokens, 256)
    assert not where[:, 128:].any() and not own[:, 128:].any()
    shares = torch.linalg.lstsq(where[:, :128].T.double(), own[:, :128].T.double()).solution  # (P, K)
    parts = shares.abs() > 1e-4
    assert parts.any(0).all() and parts.any(1).all()
    if tokens <= patches:  # each patch belongs to one token, and the patches of a token follow each other
        owner = parts.int().argmax(1)
        assert (parts.sum(1) == 1).all() and 1 + int((owner[1:] != owner[:-1]).sum()) == tokens
    else:
        assert (parts.sum(0) == 1).all()
    assert torch.equal(own, places(patches, tokens, 256)[1])


def test_a_model_on_the_meta_device_has_a_local_start_too():
    with torch.device("meta"):
        assert build("titok", "local").encoder.position.is_meta


def test_the_text_of_a_caption_has_contents_and_no_place():
    decoder = build("ta_titok", "local").decoder
    for layer in (decoder.text_proj, decoder.embed):
        assert not layer(torch.randn(8, layer.in_features))[:, :32].any()
    for block in decoder.transformer.blocks:
        query, key, _ = block.attn.qkv(torch.randn(8, 64)).chunk(3, dim=-1)
        assert torch.equal(query, key)
