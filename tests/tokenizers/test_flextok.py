"""FlexTok against the official implementation, and what follows from its definition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vistok
from tests.fill import image
from vistok.flow import APG, CFG, SAMPLERS
from vistok.hub import LoadError, count_parameters, on_meta
from vistok.layers.position import sincos_table
from vistok.tokenizers.flextok import nested_lengths
from vistok.tokenizers.flextok_blocks import Group, Layout
from vistok.tokenizers.flextok_net import causal_mask
from vistok.tokens import Tokens

TABLES = ("encoder.module_dict.enc_posemb_module.posembs", "decoder.module_dict.dec_patches_posemb_module.posembs")
TARGET = {"_target_": "os.system", "_args_": ["false"]}  # what a malicious file could ask for: it is never looked at


@pytest.fixture
def official(golden, tmp_path):
    """Writes the golden weights as the official project publishes them, and loads them."""
    ref = golden("flextok_small")
    state, facts = ref.state_dict(), ref.meta["config"]
    for key in TABLES:
        _, dim, *grid = state[key].shape
        state[key] = sincos_table(dim, tuple(grid))[None]
    tree = {
        "vae": {**TARGET, "config": ref.meta["vae_config"], "scaling_factor": facts["scaling_factor"]},
        "encoder": TARGET,
        "decoder": {**TARGET, "dec_nested_dropout": {**TARGET, "size_sampling_mode": "uniform"}},
        "regularizer": {**TARGET, "levels": facts["levels"]},
    }
    (tmp_path / "config.json").write_text(json.dumps({"config": tree}))
    save_file(state, tmp_path / "model.safetensors", metadata={k: repr(v) for k, v in tree.items()})
    return ref, vistok.load(tmp_path), tmp_path


def noised(ref, tok):
    facts = ref.meta["config"]
    x = image(facts["batch"], facts["image_size"], facts["image_seed"])
    latents = tok.frontend.encode(x)
    t = torch.tensor(facts["t"])
    return x, latents, t, tok.flow.add_noise(latents, ref["noise"], t)


@pytest.mark.parity
@torch.no_grad()
def test_latents_features_ids_and_codes_match(official):
    ref, tok, _ = official
    x, latents, _, x_t = noised(ref, tok)
    torch.testing.assert_close(latents, ref["vae_latents"], atol=1e-4, rtol=0)
    torch.testing.assert_close(x_t, ref["x_t"], atol=1e-4, rtol=0)
    torch.testing.assert_close(tok.encode_features(x), ref["enc_z"], atol=1e-4, rtol=0)
    tokens = tok.encode(x)
    assert torch.equal(tokens.ids, ref["ids"])
    torch.testing.assert_close(tok.quantizer.ids_to_codes(tokens.ids), ref["codes"], atol=0, rtol=0)
    torch.testing.assert_close(tok.encoder.patch_embed.position[::4], ref["sincos_posemb_enc"], atol=1e-5, rtol=0)


@pytest.mark.parity
@torch.no_grad()
def test_velocities_and_early_features_match(official):
    ref, tok, _ = official
    _, _, t, x_t = noised(ref, tok)
    decoder, codes = tok.decoder, ref["codes"]
    lengths = torch.tensor(ref.meta["config"]["keep_k"])
    torch.testing.assert_close(decoder.time(t), ref["time_embedding"], atol=2e-4, rtol=0)
    velocity, seen = decoder(x_t, t, decoder.registers(codes, lengths))
    torch.testing.assert_close(velocity, ref["velocity"], atol=2e-4, rtol=0)
    seen = seen.unflatten(1, (4, 4))[:, ::2, ::2, ::8]
    torch.testing.assert_close(seen, ref["repa_patches"], atol=2e-4, rtol=0)
    full, _ = decoder(x_t, t, decoder.registers(codes))
    torch.testing.assert_close(full, ref["velocity_all_tokens"], atol=2e-4, rtol=0)
    null, _ = decoder(x_t, t, decoder.registers(codes, lengths, torch.tensor([True, True])))
    torch.testing.assert_close(null, ref["velocity_uncond"], atol=2e-4, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["none", "cfg", "apg"])
def test_guided_decodes_match(official, name):
    ref, tok, _ = official
    steps, scale, apg = ref.meta["config"]["decodes"][name]
    lengths = torch.tensor(ref.meta["config"]["keep_k"])
    options = {"steps": steps, "guidance": APG(scale) if apg else CFG(scale), "noise": ref["noise"]}
    latents = tok.decode_latents(ref["codes"], lengths=lengths, **options)
    torch.testing.assert_close(latents, ref[f"decode_{name}_latents"], atol=2e-3, rtol=0)
    torch.testing.assert_close(latents, ref[f"decode_{name}_latents"], atol=5e-5, rtol=0)  # 6e-6 where it was written
    tokens = Tokens(ids=ref["ids"], vocab=(64000,), lengths=lengths)
    rgb = 2 * tok.decode(tokens, **options) - 1
    sample = ref[f"decode_{name}_rgb_sample"].clamp(-1, 1)
    torch.testing.assert_close(rgb[:, :, ::4, ::4], sample, atol=5e-3, rtol=0)


@pytest.mark.parity
def test_the_encoders_mask_is_the_official_one(golden):
    packed = golden("flextok_small")["packed_mask_2x(4patch+3reg)"].bool()
    one = causal_mask(4, 3)
    assert torch.equal(packed[:7, :7], one) and torch.equal(packed[7:14, 7:14], one)
    assert not packed[:7, 7:].any()


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["uniform", "pow2", "uniform_pow2"])
def test_nested_dropout_has_the_official_law(golden, mode):
    ref = golden("nested_dropout")
    u = (torch.arange(160_000, dtype=torch.float64) + 0.5) / 160_000
    values, counts = nested_lengths(u, 16, mode).unique(return_counts=True)
    assert torch.equal(values, ref[f"{mode}_16_law_k"])
    torch.testing.assert_close(counts / len(u), ref[f"{mode}_16_law_p"], atol=1e-5, rtol=0, check_dtype=False)


@pytest.mark.parity
def test_masking_is_the_official_one(golden):
    ref, decoder = golden("nested_dropout"), vistok.create("tokenizer", "flextok_tiny").decoder
    decoder.num_tokens, decoder.tokens = 8, lambda codes: codes
    decoder.mask_token = torch.nn.Parameter(torch.tensor([9.0, 8, 7, 6]))
    assert torch.equal(decoder.registers(ref["eval_in"], torch.tensor([1, 8, 5])), ref["eval_out"])


def test_lengths_that_are_no_power_of_two():
    u = torch.rand(2000, dtype=torch.float64)
    assert set(nested_lengths(u, 6, "uniform_pow2").tolist()) == {1, 2, 4, 6}
    with pytest.raises(ValueError, match="power of two for nested_dropout=pow2"):
        vistok.create("tokenizer", "flextok_tiny", num_tokens=12, nested_dropout="pow2")


def test_the_configuration_is_read_from_a_single_file_too(official):
    ref, tok, folder = official
    alone = vistok.load(folder / "model.safetensors")
    assert alone.config == tok.config
    assert alone.config["vae"]["scaling_factor"] == ref.meta["config"]["scaling_factor"]
    assert alone.config["vae"]["groups"] == 8


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "levels"])
def test_a_checkpoint_that_does_not_fit_is_refused(official, change):
    ref, _, folder = official
    state, config = ref.state_dict(), json.loads((folder / "config.json").read_text())
    if change == "missing":
        del state["decoder.module_dict.dec_to_patches.proj.bias"]
    elif change == "extra":
        state["decoder.module_dict.dec_other.weight"] = torch.zeros(2)
    elif change == "shape":
        state["decoder.module_dict.dec_time_embedder.mlp.0.bias"] = torch.zeros(7)
    else:
        config["config"]["regularizer"]["levels"] = [8, 8]
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match={"levels": "FSQ levels are"}.get(change, "does not fit FlexTok")):
        vistok.load(folder)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("flextok_d12_d12.in1k", 85.4, 172.4),
        ("flextok_d18_d18.in1k", 287.3, 578.6),
        ("flextok_d18_d28.in1k", 287.3, 2169.7),
        ("flextok_d18_d28.dfn", 287.3, 2169.7),
    ],
)
def test_published_models_have_the_published_size(name, encoder, decoder):
    tok = on_meta("tokenizer", name)
    for part, millions in ((tok.encoder, encoder), (tok.decoder, decoder)):  # the tables are parameters there
        found = count_parameters(part) + part.patch_embed.position.numel()
        assert found / 1e6 == pytest.approx(millions, abs=0.1)
    assert count_parameters(tok.frontend) / 1e6 == pytest.approx(83.8, abs=0.1)


@pytest.fixture(scope="module")
def tok():
    """A tiny model whose every part is alive (heads and modulations are zero at the start)."""
    torch.manual_seed(1)
    model = vistok.create("tokenizer", "flextok_tiny").eval()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.05)
    return model


def plain_latents(tok, codes, lengths, noise, sampler, guidance):
    """Decoding as one would write it down: every masked token there, every modulation anew, branch after branch."""

    def field(x, t, branches=1):
        time = torch.full((len(x),), t)
        full = tok.decoder.registers(codes, lengths)
        null = tok.decoder.registers(codes, lengths, torch.ones(len(x), dtype=torch.bool))
        return [tok.flow.velocity(tok.decoder(x, time, r)[0], x, time) for r in (full, null)[:branches]]

    return sampler(field, noise, guidance)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1, 1, 1], [5, 5, 5], [15, 15, 15], [16, 16, 16], [1, 7, 16], [0, 3, 15]])
@pytest.mark.parametrize("guidance", [CFG(3.0), APG(7.5), CFG(1.0)])
def test_fast_decoding_is_exact(tok, lengths, guidance):
    codes = torch.rand(3, 16, 6) * 2 - 1
    lengths, noise = torch.tensor(lengths), torch.randn(3, 3, 64, 64)
    fast = tok.decode_latents(codes, lengths=lengths, steps=3, guidance=guidance, noise=noise)
    plain = plain_latents(tok, codes, lengths, noise, SAMPLERS["euler"](3), guidance)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)
    alone = tok.decode_latents(codes[:1], lengths=lengths[:1], steps=3, guidance=guidance, noise=noise[:1])
    torch.testing.assert_close(alone, fast[:1], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_its_tabulated_times(tok, name):
    codes, noise = torch.rand(2, 4, 6), torch.randn(2, 3, 64, 64)
    sampler = SAMPLERS[name](3, shift=1.5)
    other = vistok.create("tokenizer", "flextok_tiny", sampling={"sampler": name, "steps": 3, "shift": 1.5})
    other.load_state_dict(tok.state_dict())
    plain = plain_latents(tok, codes, None, noise, sampler, CFG(2.0))
    fast = other.eval().decode_latents(codes, guidance=CFG(2.0), noise=noise)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)


def test_prefixes_do_not_depend_on_what_follows(tok):
    x = image(2, 64)
    features = tok.encode_features(x)
    with torch.no_grad():
        short = tok.encoder(tok.frontend.encode(x), 5)
        tok.encoder.registers[5:].add_(1)
        torch.testing.assert_close(tok.encode_features(x)[:, :5], features[:, :5], rtol=0, atol=1e-6)
        tok.encoder.registers[5:].sub_(1)
    torch.testing.assert_close(short, features[:, :5], rtol=0, atol=1e-5)


def test_decoding_depends_on_the_tokens_alone(tok):
    tokens = tok.encode(image(3, 64))
    pictures = tok.decode(tokens)
    torch.testing.assert_close(tok.decode(tokens[1:2]), pictures[1:2], rtol=0, atol=1e-5)
    assert torch.equal(tok.decode(tokens.ids), pictures)
    short = tok.decode(tokens[:, :4])
    assert not torch.equal(short, pictures)
    padded = tokens.ids.clone()
    padded[:, 4:] = 63_999
    ragged = Tokens(ids=padded, vocab=tokens.vocab, lengths=torch.tensor([4, 16, 4]))
    torch.testing.assert_close(tok.decode(ragged)[::2], short[::2], rtol=0, atol=1e-4)


def test_noise_comes_from_a_generator_or_as_it_is(tok):
    tokens = tok.encode(image(2, 64))
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    drawn = tok.decode(tokens, generator=torch.Generator().manual_seed(5), steps=2, guidance=2.0)
    assert torch.equal(tok.decode(tokens, noise=noise, steps=2, guidance=2.0), drawn)
    assert not torch.equal(tok.decode(tokens, steps=2, guidance=2.0), drawn)
    with pytest.raises(ValueError, match=r"Noise is \(2, 3, 64, 64\)"):
        tok.decode(tokens, noise=noise[:1])
    with pytest.raises(ValueError, match="at least 1 step"):
        tok.decode(tokens, steps=0)


def test_training_reaches_every_parameter(tok):
    model = vistok.create("tokenizer", "flextok_tiny", repa_dim=12)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.05)
    out = model(image(3, 64), lengths=torch.tensor([3, 16, 8]), null=torch.tensor([False, False, True]))
    assert out.images is None and out.extras["repa"].shape == (3, 8, 8, 12)
    (out.extras["velocity"].square().mean() + out.extras["repa"].square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_an_untrained_model_starts_at_the_loss_of_silence():
    model, x = vistok.create("tokenizer", "flextok_tiny"), image(2, 64)
    extras = model(x).extras
    assert not extras["velocity"].any()
    loss = model.flow.loss(extras["velocity"], extras["latents"], extras["noise"])
    expected = (extras["noise"] - (2 * x - 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected)
    ids = model.eval().encode(x).ids
    assert bool((ids == 4 * (1 + 8 + 64) + 2 * (512 + 2560 + 12800)).all())  # the centre of the grid, 32036


@pytest.mark.parametrize("vae", [None, {"channels": [8, 8], "latent_channels": 4, "groups": 4, "scaling_factor": 0.7}])
def test_saved_model_is_bit_identical(tmp_path, vae):
    model = vistok.create("tokenizer", "flextok_tiny", vae=vae, patch_size=4).eval()
    loaded = vistok.load(model.save_pretrained(tmp_path))
    x = image(1, 64)
    assert loaded.config == model.config and loaded.model_id == model.model_id
    assert torch.equal(loaded.decode(loaded.encode(x)), model.decode(model.encode(x)))


def test_a_vae_comes_from_a_local_diffusers_folder(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.3,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    model = vistok.create("tokenizer", "flextok_tiny", patch_size=4, vae={"path": tmp_path / "vae"}).eval()
    x = image(2, 64)
    with torch.no_grad():
        expected = vae.encode(2 * x - 1).latent_dist.mode() * 0.3
        torch.testing.assert_close(model.frontend.encode(x), expected)
        torch.testing.assert_close(model.frontend.decode(expected), (vae.decode(expected / 0.3).sample + 1) / 2)
    assert not any(p.requires_grad for p in model.frontend.parameters())
    assert not model.train().frontend.vae.training
    model.eval().save_pretrained(tmp_path / "tok")
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    loaded = vistok.load(tmp_path / "tok")  # carries the autoencoder itself
    assert torch.equal(loaded.encode(x).ids, model.encode(x).ids)
    with pytest.raises(ValueError, match=r"vae.path: There is no folder"):
        vistok.create("tokenizer", "flextok_tiny", vae={"path": tmp_path / "vae"})


def test_half_precision_keeps_the_autoencoder_exact():
    vae = {"channels": [8, 8], "latent_channels": 4, "groups": 4}
    model = vistok.create("tokenizer", "flextok_tiny", vae=vae, patch_size=4).eval()
    latents = model.frontend.encode(image(1, 64))
    half = model.to(torch.bfloat16)
    assert torch.equal(half.frontend.encode(image(1, 64)), latents)
    assert half.encoder.registers.dtype == torch.bfloat16
    assert half.decode(half.encode(image(1, 64))).isfinite().all()


def test_bf16_autocast_decodes_close_to_float32(tok):
    tokens = tok.encode(image(2, 64))[:, :5]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tok.decode(tokens, guidance=2.0)
    torch.testing.assert_close(half, tok.decode(tokens, guidance=2.0), rtol=0, atol=0.05)


def test_smaller_and_wider_pictures_crop_the_table(tok):
    small = tok.resized((32, 64))
    assert torch.equal(small.encoder.patch_embed.position, tok.encoder.patch_embed.position[:, :4])
    assert small.decode(small.encode(torch.rand(1, 3, 32, 64))).shape == (1, 3, 32, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 60}, "60x60 is not a multiple of 8 pixels"),
        ({"table": [4, 4]}, r"have \(8, 8\) patches and the position table \(4, 4\)"),
        ({"repa_layer": 2}, r"block of the decoder, 0\.\.1"),
        ({"num_tokens": 0}, "at least 1"),
        ({"encoder": {"width": 64, "depth": 1, "heads": 5}}, "5 heads"),
    ],
)
def test_misuse_is_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message):
        vistok.create("tokenizer", "flextok_tiny", **changes)


def test_rows_of_several_groups_attend_as_their_sequences_do():
    q, k, v = torch.randn(3, 2 * 4 + 2 * 4 + 2 * 3 + 2 * 1, 2, 8).unbind(0)
    layout = Layout(4, (Group(2, 3), Group(2, 1)))
    found = layout.attend(q, k, v, scale=0.5)
    for group, registers, start in ((0, 3, 16), (1, 1, 22)):
        for i in range(2):
            rows = [*range((2 * group + i) * 4, (2 * group + i) * 4 + 4)]
            rows += [*range(start + i * registers, start + (i + 1) * registers)]
            one = torch.nn.functional.scaled_dot_product_attention(
                *(x[rows].transpose(0, 1) for x in (q, k, v)), scale=0.5
            )
            torch.testing.assert_close(found[rows], one.transpose(0, 1).flatten(1))
    np.testing.assert_equal(layout.border, 16)


@pytest.mark.parametrize("guidance", [APG(5.0), CFG(1.0)])
def test_several_lengths_at_once_equal_one_by_one(tok, guidance):
    tokens = tok.encode(image(2, 64))
    counts = (1, 4, 15, 16)
    at_once = tok.decode_lengths(tokens, counts, steps=3, guidance=guidance)
    for k, pictures in zip(counts, at_once):
        alone = tok.decode(tokens[:, :k], steps=3, guidance=guidance)
        torch.testing.assert_close(pictures, alone, rtol=0, atol=1e-4)
    assert float((at_once[0] - at_once[2]).abs().max()) > 1e-3
    assert torch.equal(tok.decode_lengths(tokens.ids, counts, steps=3, guidance=guidance)[1], at_once[1])
    with pytest.raises(ValueError, match=r"num_tokens is 1\.\.16"):
        tok.decode_lengths(tokens, (4, 17))


def test_several_lengths_share_the_network_calls(tok):
    rows, run = [], tok.decoder.run

    def watched(x, registers, groups, *args, **kwargs):
        rows.append(sum(group.count * (64 + group.registers) for group in groups))
        return run(x, registers, groups, *args, **kwargs)

    tok.decoder.run = watched
    try:
        tok.decode_lengths(tok.encode(image(1, 64)), (1, 4), steps=2, guidance=3.0)
    finally:
        del tok.decoder.run
    given, null = (64 + 2) + (64 + 5), 64 + 1
    assert rows == [given, null, given + 2 * null]  # the unguided branch once, then where the lengths have parted


def test_a_local_start_reads_and_writes_every_patch_by_a_register_of_its_own():
    torch.manual_seed(0)
    size = {"width": 64, "depth": 2, "heads": 2}
    given = {"image_size": 32, "patch_size": 8, "num_tokens": 16, "encoder": size, "decoder": size, "start": "local"}
    tok = vistok.create("tokenizer", "flextok", **given, quantizer={"name": "fsq", "levels": [8, 8, 8, 5, 5, 5]}).eval()
    grey = torch.full((1, 3, 32, 32), 0.5)
    table = tok.encoder.patch_embed.position.flatten(1).T
    order = torch.cdist(tok.encoder.registers, table).argmin(1).tolist()
    assert sorted(order) == list(range(16))
    read, written = torch.zeros(16, 16), torch.zeros(16, 16)  # how much (register, patch) have to do with each other
    for register, patch in enumerate(order):
        row, column = 8 * (patch // 4), 8 * (patch % 4)
        changed = grey.clone()
        changed[..., row : row + 8, column : column + 8] = torch.rand(3, 8, 8)
        read[:, register] = (tok.encode_features(changed) - tok.encode_features(grey)).abs().sum(-1)[0]
        codes = torch.zeros(1, 16, 6)
        codes[0, register] = 1.0
        seen = (tok.decode_codes(codes, steps=1) - tok.decode_codes(0 * codes, steps=1)).abs().mean((0, 1))
        written[register] = torch.nn.functional.avg_pool2d(seen[None, None], 8).flatten()[order]
    for shares in (read, written):
        own, others = shares.diag().mean(), shares[~torch.eye(16, dtype=torch.bool)].mean()
        assert own > 1.5 * others
