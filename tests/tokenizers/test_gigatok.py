"""GigaTok against the official implementation, and what follows from its definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import vistok
from tests.fill import fill, image
from vistok.hub import LoadError, count_parameters, on_meta
from vistok.tokenizers.gigatok_net import query_grids
from vistok.tokenizers.official import gigatok as layout

CASES = [
    ("gigatok_small", "tiny_tiny_1d", 3),
    ("gigatok_small", "tiny_tiny_2d", 4),
    ("gigatok_small", "tiny_tiny_1d_train", 6),
    ("gigatok_ss", "S_S", 7),
]
SLOW = pytest.mark.slow


class Case:
    """One case of a golden file, loaded from a checkpoint as the project writes them."""

    def __init__(self, ref, case, seed, folder):
        self.ref, self.case, self.seed = ref, case, seed
        keys = [(k, s) for k, s in ref.meta["state_dict"][case] if k != "quantize.codebook_used"]
        state = {k: torch.from_numpy(np.asarray(fill(k, tuple(s)))) for k, s in keys}
        found = {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "steps": 3}
        torch.save(found, folder / "tokenizer.pt")
        self.tok = vistok.load(folder / "tokenizer.pt")
        self.x = image(1, 256, seed)

    def __getitem__(self, key):
        return self.ref[f"{self.case}/{key}"]

    def __contains__(self, key):
        return f"{self.case}/{key}" in self.ref


def signed(pictures):
    return 2 * pictures[:, :, 1::8, ::8] - 1


@pytest.mark.parity
@pytest.mark.parametrize(("file", "case", "seed"), [*CASES[:2], *(pytest.param(*c, marks=SLOW) for c in CASES[2:])])
def test_ids_and_features_match_the_official_code(golden, tmp_path, file, case, seed):
    ref = Case(golden(file), case, seed, tmp_path)
    tok = ref.tok
    with torch.no_grad():
        features = tok.encoder(2 * ref.x - 1)
        torch.testing.assert_close(features[:, ::8], ref["cnn_feature_stride"], atol=2e-4, rtol=0)
        h = tok._quantizer_features(features)
        torch.testing.assert_close(h.transpose(1, 2).reshape(ref["h"].shape), ref["h"], atol=2e-4, rtol=0)
        quantized = tok.quantizer(h)
        sure = ref["margin"] > 1e-5
        assert torch.equal(quantized.ids[0][sure], ref["ids"][sure])
        codes = quantized.codes.transpose(1, 2).reshape(ref["quant"].shape)
        torch.testing.assert_close(codes, ref["quant"], atol=2e-5, rtol=0)
        rebuilt, tapped = tok._rebuilt_features(quantized.codes, tok.semantic_layer)
        torch.testing.assert_close(rebuilt[:, ::8], ref["rec_spatial_stride"], atol=2e-4, rtol=0)
        torch.testing.assert_close(tok.semantic(tapped)[:, ::8, ::8], ref["inner_feat_stride"], atol=2e-4, rtol=0)


@SLOW
@pytest.mark.parity
@pytest.mark.parametrize(("file", "case", "seed"), CASES)
def test_pixels_match_the_official_code(golden, tmp_path, file, case, seed):
    ref = Case(golden(file), case, seed, tmp_path)
    tokens = ref.tok.encode(ref.x)
    with torch.no_grad():
        rebuilt = ref.tok.decode_codes(tokens.codes)
    torch.testing.assert_close(signed(rebuilt), ref["rec_stride"], atol=1e-3, rtol=0)
    whole = 2 * rebuilt - 1
    moments = torch.stack([whole.mean(), whole.std(correction=0)])
    torch.testing.assert_close(moments, ref["rec_mean_std"], atol=1e-3, rtol=0)
    from_ids = ref.tok.decode(tokens.ids)
    torch.testing.assert_close(signed(from_ids), ref["rec_from_ids_stride"].clamp(-1, 1), atol=1e-3, rtol=0)


@SLOW
@pytest.mark.parity
def test_losses_of_training_match_the_official_code(golden, tmp_path):
    ref = Case(golden("gigatok_small"), "tiny_tiny_1d_train", 6, tmp_path)
    tok = ref.tok
    tok.quantizer.weights |= {"entropy_sample": 0.005, "entropy_batch": -0.005}
    tok.train()
    with torch.no_grad():
        out = tok(ref.x, direct=True)
    losses = out.quantized.losses
    torch.testing.assert_close(losses["codebook"], ref["train_vq_loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(0.25 * losses["commitment"], ref["train_commit_loss"], rtol=1e-4, atol=1e-6)
    entropy = 0.005 * (losses["entropy_sample"] - losses["entropy_batch"])
    torch.testing.assert_close(entropy, ref["train_entropy_loss"], rtol=1e-3, atol=1e-6)
    same = F.mse_loss(out.extras["features"], out.extras["rebuilt_features"])
    torch.testing.assert_close(same, ref["train_fea_rec_loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(signed(out.extras["direct"]), ref["train_direct_rec_stride"], atol=1e-3, rtol=0)
    semantic = out.extras["semantic"].flatten(1, 2)  # (B, 256, 768)
    teacher = torch.from_numpy(np.random.default_rng(56).standard_normal(semantic.shape).astype(np.float32))
    found = -F.cosine_similarity(semantic, teacher, dim=-1).mean()
    torch.testing.assert_close(found, ref["train_proj_loss"], rtol=1e-4, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("file", "case", "seed"), CASES)
def test_configuration_file_and_weights_alone_say_the_same(golden, file, case, seed):
    ref = golden(file)
    tensors = {k: torch.empty(tuple(s), device="meta") for k, s in ref.meta["state_dict"][case]}
    name, alone, _ = layout.convert({}, tensors)
    with_config = layout.convert({"model": {"init_args": ref.meta["cases"][case]["config"]}}, tensors)[1]
    entropy = with_config["quantizer"].pop("entropy_weight", 0.0)
    assert entropy == ref.meta["cases"][case]["config"]["entropy_loss_ratio"]
    assert alone == with_config
    assert count_parameters(on_meta("tokenizer", name, **alone)) == ref.meta["cases"][case]["params"]


@pytest.mark.parametrize(
    ("name", "total", "encoder", "decoder", "semantic"),
    [
        ("gigatok_ss.in1k", 136_073_227, 26_013_440, 33_619_968, 6_820_608),
        ("gigatok_sb.in1k", 232_399_627, 26_013_440, 129_946_368, 14_162_688),
        ("gigatok_bl.in1k", 621_637_131, 114_801_408, 430_395_904, 24_126_208),
        ("gigatok_bl_dino_disc.in1k", 621_637_131, 114_801_408, 430_395_904, 24_126_208),
        ("gigatok_xl_xxl.in1k", 2_893_970_443, 947_548_928, 1_869_981_696, 51_917_568),
        ("gigatok_2d_ss", 135_548_427, 25_619_712, 33_488_896, 6_820_608),
        ("gigatok_2d_sb", 197_132_555, 19_309_824, 101_382_912, 14_162_688),
        ("gigatok_2d_bl", 491_410_187, 85_647_360, 329_323_008, 24_126_208),
    ],
)
def test_published_models_have_exactly_the_published_size(name, total, encoder, decoder, semantic):
    tok = on_meta("tokenizer", name)
    parts = [count_parameters(p) for p in (tok.to_tokens, tok.to_map, tok.semantic)]
    assert (count_parameters(tok), parts) == (total, [encoder, decoder - semantic, semantic])
    assert count_parameters(tok.encoder) == 26_143_232
    assert count_parameters(tok.decoder) == 50_161_155


def test_weights_on_no_hub_say_where_they_are():
    with pytest.raises(LoadError, match=r"VQ_SS256_e100.pt \(see README of github.com/SilentView/GigaTok"):
        vistok.load("gigatok_ss.in1k")


@pytest.mark.parity
def test_checkpoint_without_the_semantic_head_loads(golden, tmp_path):
    ref = golden("gigatok_small")
    keys = [(k, s) for k, s in ref.meta["state_dict"]["tiny_tiny_2d"] if "distill_mlp" not in k]
    torch.save({"ema": {k: torch.from_numpy(np.asarray(fill(k, tuple(s)))) for k, s in keys}}, tmp_path / "t.pt")
    assert vistok.load(tmp_path / "t.pt").semantic is None


def test_options_no_published_model_has_are_refused(golden):
    ref = golden("gigatok_small")
    tensors = {k: torch.empty(tuple(s), device="meta") for k, s in ref.meta["state_dict"]["tiny_tiny_1d"]}
    with pytest.raises(LoadError, match="use_attn True, which no published one has"):
        layout.convert({"use_attn": True}, tensors)
    with pytest.raises(LoadError, match="multi_level_query_init False"):
        layout.convert({"multi_level_query_init": False}, tensors)


TINY = ["gigatok_tiny", "gigatok_2d_tiny"]


def test_query_blocks_go_from_coarse_to_fine():
    assert query_grids(16, (4, 4)) == [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4)]
    assert sum(h * w for h, w in query_grids(256, (16, 16))) == 256


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_decode_to_the_same_pictures_as_ids(name, batch):
    tok = vistok.create("tokenizer", name).eval()
    tokens = tok.encode(image(batch, 64))
    assert tokens.ids.shape == (batch, 16)
    assert tokens.grid == ((4, 4) if "2d" in name else None)
    torch.testing.assert_close(tok.decode(tokens.ids), tok.decode(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_saved_and_loaded_tokenizer_is_bit_identical(name, tmp_path):
    tok = vistok.create("tokenizer", name).eval()
    tok.save_pretrained(tmp_path)
    again, x = vistok.load(tmp_path), image(1, 64)
    assert (again.config, again.model_id) == (tok.config, tok.model_id)
    assert torch.equal(tok.decode(tok.encode(x)), again.decode(again.encode(x)))


@pytest.mark.parametrize("name", TINY)
def test_training_reaches_every_parameter(name):
    tok = vistok.create("tokenizer", name)
    out = tok(image(2, 64))
    assert out.extras["semantic"].shape == (2, 4, 4, 32)
    total = out.images.square().mean() + out.quantized.loss + out.extras["semantic"].square().mean()
    total.backward()
    assert [n for n, p in tok.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_changes_nothing(name):
    tok, x = vistok.create("tokenizer", name), image(2, 64)

    def gradients(checkpointing):
        for part in (tok.to_tokens, tok.to_map):
            part.transformer.gradient_checkpointing = checkpointing
        tok.zero_grad()
        out = tok(x)
        (out.images.square().mean() + out.extras["semantic"].square().mean()).backward()
        return [p.grad.clone() for p in tok.parameters() if p.grad is not None]

    for plain, checked in zip(gradients(False), gradients(True)):
        torch.testing.assert_close(plain, checked)


@pytest.mark.parametrize("name", TINY)
def test_whole_model_in_bf16_encodes_and_decodes(name):
    tok = vistok.create("tokenizer", name).to(torch.bfloat16).eval()
    assert tok.decode(tok.encode(image(1, 64))).isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_resized_model_takes_wide_pictures(name):
    tok = vistok.create("tokenizer", name).eval()
    wide = tok.resized((64, 128))
    x = torch.rand(1, 3, 64, 128)
    assert wide.decode(wide.encode(x)).shape == (1, 3, 64, 128)
    assert torch.equal(tok.resized((64, 64)).encode(image(1, 64)).ids, tok.encode(image(1, 64)).ids)


def test_the_picture_of_the_decoder_hangs_on_the_first_token_most():
    """All queries of the 1D decoder start as copies of token 0."""
    tok = vistok.create("tokenizer", "gigatok_tiny").eval()
    with torch.no_grad():
        tokens = tok.code_proj(tok.encode(image(1, 64)).codes)
        for block in tok.to_map.transformer.blocks:
            for attention in (block.self_attn, block.cross_attn):
                attention.proj.weight.zero_()
                attention.proj.bias.zero_()
        before = tok.to_map(tokens)[0]
        tokens[:, 1:] = 0
        torch.testing.assert_close(tok.to_map(tokens)[0], before)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gigatok_tiny", {"num_tokens": 12}, "power of two for GigaTok's queries, got 12"),
        ("gigatok_tiny", {"num_tokens": 64}, "64 tokens need a map of multiples of 4x8, and this one is 4x4"),
        ("gigatok_tiny", {"image_size": 40}, "image_size 40x40 is not a multiple of 16"),
        ("gigatok_tiny", {"channels": 48}, "channels is a multiple of the 32 groups"),
        ("gigatok_tiny", {"semantic_layer": 4}, r"semantic_layer is 1\.\.3 for this decoder, got 4"),
        (
            "gigatok_tiny",
            {"quantizer": {"name": "multiscale", "codebook_size": 8, "dim": 4, "scales": [1, 4]}},
            "needs a grid of features",
        ),
    ],
)
def test_misuse_is_one_clear_line(name, config, message):
    with pytest.raises(ValueError, match=message):
        vistok.create("tokenizer", name, **config)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("quantizer", [{"name": "fsq", "levels": [8, 8, 8]}, {"name": "gaussian", "dim": 6}])
def test_any_quantizer_fits(name, quantizer):
    tok = vistok.create("tokenizer", name, quantizer=quantizer).eval()
    assert tok.decode(tok.encode(image(1, 64))).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", ["gigatok_tiny", "gigatok_2d_tiny"])
def test_norms_have_the_groups_that_were_asked_for_and_the_same_weights(name):
    published = vistok.create("tokenizer", name)
    grouped = vistok.create("tokenizer", name, groups=8)
    assert {m.num_groups for m in grouped.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}
    grouped.load_state_dict(published.state_dict())
    picture = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(grouped.encode_features(picture), published.encode_features(picture), atol=1e-4)
