"""WeTok against the official implementation, and what follows from its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

import vistok
from tests.fill import fill, image
from vistok.hub import LoadError, count_parameters, on_meta
from vistok.tokenizers.wetok import WeTokEncoder

CASES = ["plain_f4", "gan_f8", "plain_rect"]
INPUT = {"plain_f4": (2, 11, 64), "gan_f8": (1, 12, 64), "plain_rect": (1, 13, 32)}  # batch, seed, height


def official_config(case: dict) -> dict:
    """The published YAML, cut to what says something about the model."""
    arguments = {
        "ddconfig": case["ddconfig"],
        "n_embed": 2 ** case["bits_per_group"],
        "embed_dim": case["ddconfig"]["z_channels"],
        "num_codebooks": case["groups"],
        "gan_decoder": case["gan_decoder"],
        "use_ema": True,
    }
    return {"model": {"class_path": "src.WeTok.models.lfqgan.VQModel", "init_args": arguments}}


def weights(ref, name: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.asarray(fill(k, tuple(s)))) for k, s in ref.meta["state_dict"][name]}


@pytest.fixture
def official(golden, tmp_path):
    """Writes a case as the project publishes it, a YAML and a Lightning checkpoint, and loads it."""

    def load(name):
        ref = golden("wetok_small")
        (tmp_path / "WeTok.yaml").write_text(yaml.safe_dump(official_config(ref.meta["cases"][name])))
        state = weights(ref, name)
        extra = {"loss.discriminator.main.0.weight": torch.zeros(4), "loss.perceptual_loss.lin0.weight": torch.zeros(2)}
        lightning = {"state_dict": state | extra, "epoch": 3, "optimizer_states": [{"state": {0: torch.zeros(3)}}]}
        torch.save(lightning, tmp_path / "WeTok.ckpt")
        batch, seed, height = INPUT[name]
        return ref, vistok.load(tmp_path), image(batch, 64, seed)[:, :, :height]

    return load


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_features_ids_and_pixels_match_the_official_ones(official, name):
    ref, tok, picture = official(name)
    h, rec, ids = ref[f"{name}/h"], ref[f"{name}/rec"], ref[f"{name}/ids"]
    tokens = tok.encode(picture)
    assert tokens.grid == tuple(h.shape[-2:])
    assert tokens.ids.shape == (len(picture), h.shape[-2] * h.shape[-1], len(tok.quantizer.vocab_sizes))
    with torch.no_grad():
        features = tok.encode_features(picture).transpose(1, 2).unflatten(2, tokens.grid)
    torch.testing.assert_close(features, h, atol=2e-4, rtol=0)
    assert torch.equal(tokens.ids.flatten(), ids)
    options = {}
    if tok.decoder.generative:
        options["noise"] = torch.from_numpy(np.random.default_rng(712).standard_normal(h.shape).astype(np.float32))
    pictures = tok.decode(tokens, **options)
    torch.testing.assert_close(pictures, (0.5 * rec + 0.5).clamp(0, 1), atol=5e-4, rtol=0)


@pytest.mark.parity
def test_a_single_file_without_yaml_is_the_same_model(official, tmp_path):
    _, tok, picture = official("gan_f8")
    (tmp_path / "WeTok.yaml").unlink()
    alone = vistok.load(tmp_path / "WeTok.ckpt")
    assert alone.config == tok.config
    assert torch.equal(alone.encode(picture).ids, tok.encode(picture).ids)


def test_averaged_weights_replace_the_plain_ones(golden, tmp_path):
    state = weights(golden("wetok_small"), "plain_rect")
    decoder = {k: v for k, v in state.items() if k.startswith("decoder.")}
    averages = {f"model_ema.{k.replace('.', '')}": v + 1 for k, v in decoder.items()}  # none of a frozen encoder
    averages |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    torch.save({"state_dict": state | averages}, tmp_path / "WeTok.ckpt")
    found = vistok.load(tmp_path / "WeTok.ckpt").state_dict()
    assert all(torch.equal(found[k], v + (k in decoder)) for k, v in state.items())


def test_groups_that_do_not_fit_the_weights_are_refused(golden, tmp_path):
    ref = golden("wetok_small")
    torch.save({"state_dict": weights(ref, "plain_rect")}, tmp_path / "a.ckpt")
    config = official_config(ref.meta["cases"]["plain_rect"])
    config["model"]["init_args"]["num_codebooks"] = 5
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(LoadError, match="5 groups of 256 codes, but the encoder gives 24 bits"):
        vistok.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("wetok_r24.general", 193_655_360, 254_750_467),
        ("wetok_r48.general", 193_622_560, 254_258_947),
        ("wetok_r192.general", 198_935_328, 261_358_851),
        ("wetok_r768.general", 720_160_544, 953_518_339),
        ("wetok_f8.in1k", 193_622_560, 254_258_947),
        ("wetok_f16.in1k", 198_935_328, 261_358_851),
    ],
)
def test_published_models_have_the_published_size(name, encoder, decoder):
    model = on_meta("tokenizer", name)
    assert (count_parameters(model.encoder), count_parameters(model.decoder)) == (encoder, decoder)


@pytest.fixture
def generative():
    return vistok.create("tokenizer", "wetok_generative_tiny").eval()


def test_noise_is_part_of_the_answer(generative):
    tokens = generative.encode(image(3, 32))
    fixed = generative.decode(tokens)
    torch.testing.assert_close(generative.decode(tokens[1]), fixed[1:2], rtol=0, atol=1e-5)  # batch = singles
    drawn = generative.decode(tokens, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, generative.decode(tokens, noise=noise))
    assert not torch.equal(drawn, fixed)


def test_training_draws_noise_from_the_generator(generative):
    generative.train()
    once, again, other = (
        generative(image(1, 32), generator=torch.Generator().manual_seed(s)).images for s in (1, 1, 2)
    )
    assert torch.equal(once, again) and not torch.equal(once, other)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("wetok_generative_tiny", (1, 16, 4, 5), r"Noise is \(1, 16, 4, 4\)"),
        ("wetok_tiny", (1, 16, 4, 4), "takes no noise"),
    ],
)
def test_noise_that_does_not_fit_is_said(name, shape, message):
    tok = vistok.create("tokenizer", name).eval()
    with pytest.raises(ValueError, match=message):
        tok.decode(tok.encode(image(1, 32)), noise=torch.zeros(shape))


def test_second_stage_starts_where_the_first_ended(generative):
    first = vistok.create("tokenizer", "wetok_tiny").eval()
    generative.start_from(first, "stage one")
    tokens = first.encode(image(2, 32))
    assert torch.equal(generative.encode(image(2, 32)).ids, tokens.ids)
    torch.testing.assert_close(generative.decode(tokens), first.decode(tokens), rtol=0, atol=1e-5)
    with pytest.raises(LoadError, match="wrong shape"):
        first.start_from(generative, "stage two")


def test_a_single_code_has_no_deviation():
    tok = vistok.create("tokenizer", "wetok_tiny").eval()
    assert tok.decode(tok.encode(torch.rand(1, 3, 7, 8))).isfinite().all()


def test_features_are_float32_whatever_the_precision():
    tok = vistok.create("tokenizer", "wetok_generative_tiny").to(torch.bfloat16).eval()
    assert tok.encode_features(image(1, 32)).dtype == torch.float32
    pictures = tok.decode(tok.encode(image(1, 32)))
    assert pictures.dtype == torch.float32 and pictures.isfinite().all()


def test_training_reaches_every_parameter():
    tok = vistok.create("tokenizer", "wetok_generative_tiny")
    out = tok(image(2, 32))
    (out.images.square().mean() + out.quantized.loss).backward()
    assert [n for n, p in tok.named_parameters() if p.grad is None] == []


def test_widths_that_group_norm_cannot_split_are_refused():
    with pytest.raises(ValueError, match="multiple of the 32 groups"):
        vistok.create("tokenizer", "wetok_tiny", channels=48)


def test_the_last_level_keeps_its_size():
    assert WeTokEncoder(8, [32, 32], 1)(torch.rand(1, 3, 10, 12)).shape == (1, 30, 8)


def test_norms_have_the_groups_that_were_asked_for_and_the_same_weights():
    published = vistok.create("tokenizer", "wetok_tiny")
    grouped = vistok.create("tokenizer", "wetok_tiny", groups=8)
    assert {m.num_groups for m in grouped.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}
    grouped.load_state_dict(published.state_dict())
    picture = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(grouped.encode_features(picture), published.encode_features(picture), atol=1e-3)
