"""MingTok and its flow head against the official implementation, and what causality implies."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.fill import fill, image
from vistok.flow import CFG, DualCFG, FlowHead, HeunSampler
from vistok.hub import LoadError, count_parameters, on_meta
from vistok.layers.cache import KeyValueCache
from vistok.tokenizers.mingtok_net import narrow, widen
from vistok.tokenizers.official.mingtok import load_head
from vistok.tokens import Tokens

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture
def official(golden, tmp_path):
    """Writes the golden weights as the official project publishes them, and loads them."""
    ref = golden("mingtok_small")
    (tmp_path / "config.json").write_text(json.dumps({"config": ref.meta["config"]}))
    extra = {"target_backbone.weight": torch.zeros(3)}  # training checkpoints carry their teachers
    save_file(ref.state_dict() | extra, tmp_path / "model.safetensors")
    return ref, vistok.load(tmp_path)


@pytest.mark.parity
@torch.no_grad()
def test_latents_features_and_pictures_match(official):
    ref, tok = official
    x = image(2, 128, 0)
    raw = tok.raw_latents(x)
    torch.testing.assert_close(tok.quantizer.mode(raw), ref["latent"], **CLOSE)
    tokens = tok.encode(x)
    assert tokens.ids is None and tokens.grid == (4, 4)
    torch.testing.assert_close(tokens.codes, ref["latent"][:, :-1], **CLOSE)
    features = tok.expand(tokens.codes)
    torch.testing.assert_close(features[:, ::3], ref["semantic"], **CLOSE)
    torch.testing.assert_close(tok.pixels.patches(features, (4, 4))[:, ::5, ::7], ref["pixel_pred_sample"], **CLOSE)
    torch.testing.assert_close(2 * tok.decode(tokens)[..., ::4, ::4] - 1, ref["recon"], rtol=1e-4, atol=4e-5)


@pytest.mark.parity
@torch.no_grad()
def test_another_size_matches_with_interpolated_positions(official):
    ref, tok = official
    other, x = tok.resized((192, 192)), image(1, 192, 1)
    torch.testing.assert_close(other.raw_latents(x), ref["latent_size2"], **CLOSE)
    rebuilt = other.decode(other.encode(x))
    torch.testing.assert_close(2 * rebuilt[..., ::4, ::4] - 1, ref["recon_size2"], rtol=1e-4, atol=4e-5)


@pytest.mark.parity
@torch.no_grad()
def test_pixel_loss_matches_with_and_without_a_mask(official):
    from vistok.train.steps.mingtok import kept_l1

    ref, tok = official
    x = image(2, 128, 0)
    rebuilt = tok(x).images
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, ::2] = True
    found = [kept_l1(rebuilt, x, None, (4, 4)), kept_l1(rebuilt, x, hidden, (4, 4))]
    torch.testing.assert_close(2 * torch.stack(found).double(), ref["loss_l1_plain"], rtol=1e-4, atol=2e-5)


@pytest.fixture
def head(golden):
    ref = golden("mingtok_small")
    state = {k: torch.from_numpy(np.asarray(fill(k, tuple(s)))) for k, s in ref.meta["rf_state_dict"]}
    facts = ref.meta["rf_config"]
    rng = np.random.default_rng(facts["seed"])
    shapes = {"x": (5, facts["C"]), "t": (5,), "z": (5, facts["zc"]), "zs": (3, facts["zc"]), "noise": (3, facts["C"])}
    drawn = {n: rng.random(s) if n == "t" else rng.standard_normal(s) for n, s in shapes.items()}
    return ref, load_head(state), {n: torch.from_numpy(v.astype(np.float32)) for n, v in drawn.items()}


@pytest.mark.parity
@torch.no_grad()
def test_the_flow_heads_velocity_matches(head):
    ref, net, given = head
    torch.testing.assert_close(net(given["x"], given["t"], given["z"]), ref["rf_velocity"], **CLOSE)


@pytest.mark.parity
def test_the_flow_heads_samples_match(head):
    ref, net, given = head
    facts, zs = ref.meta["rf_config"], given["zs"][:, None]
    noise, steps = given["noise"][:1], facts["steps"]
    dual = DualCFG(facts["text"], facts["img"])
    renormed = DualCFG(facts["text"], facts["img"], renorm=facts["renorm"])
    cases = {
        "cfg3": net.sample(zs, steps=steps, guidance=dual, noise=noise),
        "cfg3_renorm_shift": net.sample(zs, steps=steps, guidance=renormed, noise=noise, shift=facts["shift"]),
        "cfg2": net.sample(zs[:2], steps=steps, guidance=CFG(facts["text"]), noise=noise, temperature=0.9),
        "nocfg": net.sample(zs[0], steps=steps, guidance=CFG(facts["text"]), noise=noise),
    }
    for name, found in cases.items():
        torch.testing.assert_close(found[0], ref[f"rf_sample_{name}"], rtol=1e-4, atol=1e-4, msg=name)


def test_the_flow_head_takes_other_samplers_and_batches():
    net = FlowHead(channels=4, condition=6, width=16, depth=2)
    torch.nn.init.normal_(net.head.weight)
    z = torch.randn(2, 3, 6)
    noise = torch.randn(3, 4)
    found = net.sample(z, steps=3, noise=noise, sampler=HeunSampler)
    assert found.shape == (3, 4)
    one = net.sample(z[:, 1:2], steps=3, noise=noise[1:2], sampler=HeunSampler)
    torch.testing.assert_close(one, found[1:2])
    drawn = net.sample(z[0], generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, net.sample(z[0], generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="2 branches do not fit DualCFG"):
        net.sample(z, guidance=DualCFG())
    with pytest.raises(LoadError, match="no flow head"):
        load_head({})


def test_the_published_model_has_the_published_size():
    tok = on_meta("tokenizer", "mingtok_vision")
    parts = {"encoder": 87.65, "semantic": 302.77, "pixels": 303.10 + 4.20}
    for name, millions in parts.items():
        assert count_parameters(getattr(tok, name)) / 1e6 == pytest.approx(millions, abs=0.02)
    with torch.device("meta"):
        assert count_parameters(FlowHead(channels=32, condition=3072)) / 1e9 == pytest.approx(1.285, abs=0.002)


@pytest.fixture(scope="module")
def tok():
    torch.manual_seed(0)
    return vistok.create("tokenizer", "mingtok_tiny").eval()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 16, [16], [5, 1, 10], [1, 15]])
def test_cached_steps_equal_the_parallel_pass(tok, chunks):
    codes = torch.randn(3, 16, 8)
    cache, found = KeyValueCache(), []
    for part in codes.split(chunks, dim=1):
        found.append(tok.expand(part, cache))
    assert cache.length == 16
    torch.testing.assert_close(torch.cat(found, 1), tok.expand(codes), rtol=0, atol=1e-5)


@torch.no_grad()
def test_cached_steps_keep_their_context(tok):
    codes = torch.randn(1, 4, 8)
    cache = KeyValueCache()
    last = [tok.expand(codes[:, i : i + 1], cache) for i in range(4)][-1]
    assert float((last - tok.expand(codes[:, 3:])).abs().max()) > 1e-4  # alone it would see nothing before it
    with pytest.raises(ValueError, match="holds a batch of 1, got one of 2"):
        tok.expand(torch.randn(2, 1, 8), cache)


@torch.no_grad()
def test_features_depend_on_what_stands_before_only(tok):
    codes = torch.randn(2, 16, 8)
    changed = codes[:, [0, 1, 2, 9, 4, 5, 6, 7, 8, 3, *range(10, 16)]]
    before, after = tok.expand(codes), tok.expand(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert bool(((before - after)[:, 3:].abs().amax(-1) > 1e-6).all())


def test_shortcuts_undo_each_other():
    x = torch.arange(8.0)
    assert torch.equal(narrow(x, 2), torch.tensor([1.5, 5.5]))
    assert torch.equal(widen(torch.tensor([1.0, 2.0]), 4), torch.tensor([1.0, 1, 2, 2]))
    assert torch.equal(narrow(widen(x, 32), 8), x)


def test_latents_are_tokens_without_ids(tok, tmp_path):
    x = image(3, 64)
    tokens = tok.encode(x)
    assert tokens.ids is None and tokens.codes.shape == (3, 16, 8) and tokens.grid == (4, 4)
    pictures = tok.decode(Tokens(ids=None, codes=tokens.codes, grid=(4, 4)))
    assert torch.equal(pictures, tok.decode(tokens)) and pictures.shape == (3, 3, 64, 64)
    loaded = vistok.load(tok.save_pretrained(tmp_path))
    assert torch.equal(loaded.decode(loaded.encode(x)), pictures)
    with pytest.raises(ValueError, match="gives one answer"):
        tok.encode(x, sample=True)
    with pytest.raises(ValueError, match="no ids"):
        tok.decode(torch.zeros(1, 16, dtype=torch.int64))


def test_normalised_latents_are_restored():
    model = vistok.create("tokenizer", "mingtok_tiny", mean=1.5, scale=4.0).eval()
    codes = model.encode(image(2, 64)).codes
    torch.testing.assert_close(model.quantizer.restore(codes), model.encode_features(image(2, 64)))


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (64, 96)])
def test_other_sizes_decode_to_their_own(tok, size):
    other = tok.resized(size)
    assert other.decode(other.encode(torch.rand(1, 3, *size))).shape == (1, 3, *size)


def test_bf16_autocast_keeps_the_pixels_in_float32(tok):
    x = image(1, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        features = tok.expand(tok.encode(x).codes)
        assert tok.to_pixels(features.float()).dtype == torch.float32
    half = vistok.create("tokenizer", "mingtok_tiny").eval().to(torch.bfloat16)
    assert half.decode(half.encode(x)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 60}, "60x60 is not a multiple of the patch size 16"),
        ({"pixel_patch": 5}, "pixel_patch 5 does not divide"),
        ({"latent_dim": 7}, "latent_dim 7 does not divide"),
        ({"scale": 0.0}, "scale of latents is positive"),
    ],
)
def test_misuse_is_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message):
        vistok.create("tokenizer", "mingtok_tiny", **changes)
