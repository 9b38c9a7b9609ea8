"""TiTok with a frequency path: a sound code before training, any quantizer, saved and copied bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import vistok
from tests.fill import image
from vistok.image import Preprocess
from vistok.tokenizers.spectral_titok import (
    OPPONENT,
    FrequencySynthesis,
    calibrate,
    dct_matrix,
    expected_power,
    lay_out,
)

SMALL = {"width": 32, "depth": 1, "heads": 2}
SHAPE = {"image_size": 64, "patch_size": 8, "num_tokens": 32, "encoder": SMALL, "decoder": SMALL, "channels": 16}
UNEQUAL = {"name": "fsq_symmetric", "levels": [32, 8, 4, 2, 2]}
VECTOR = {"name": "vq_ema", "codebook_size": 512, "dim": 8, "kmeans_init": True}


def build(quantizer=UNEQUAL, **changes):
    return vistok.create("tokenizer", "spectral_titok", **{**SHAPE, "quantizer": quantizer, **changes}).eval()


def psnr(rebuilt, images):
    return float(-10 * torch.log10((rebuilt - images).square().flatten(1).mean(1)).mean())


@pytest.fixture(scope="module")
def pictures():
    """The eight held-out photographs at 128 px."""
    from vistok.data.bundled import Photos

    preprocess, photos = Preprocess(size=(128, 128)), Photos(split="heldout")
    return torch.stack([preprocess(photos.read(i).picture) for i in range(len(photos))])


def test_dct_rows_are_orthonormal():
    rows = dct_matrix(20, 48)
    torch.testing.assert_close(rows @ rows.T, torch.eye(20), rtol=0, atol=1e-6)


def test_colours_are_orthonormal():
    colours = torch.tensor(OPPONENT)
    torch.testing.assert_close(colours @ colours.T, torch.eye(3), rtol=0, atol=1e-6)


def test_power_falls_with_frequency_and_is_symmetric():
    power = expected_power((32, 32))
    assert (np.diff(power[0, 0, 1:]) < 0).all() and np.allclose(power, power.transpose(0, 2, 1))


def test_untrained_model_beats_flat_cells_by_three_decibels(pictures):
    model = build(image_size=128, patch_size=16, num_tokens=128)
    cells = torch.nn.functional.avg_pool2d(pictures, 16).repeat_interleave(16, 2).repeat_interleave(16, 3)
    rebuilt = model.decode(model.encode(pictures))
    assert psnr(rebuilt, pictures) > 21.3 > psnr(cells, pictures) + 3


def test_unequal_levels_beat_equal_ones(pictures):
    def figure(levels):
        model = build({"name": "fsq_symmetric", "levels": levels}, image_size=128, patch_size=16, num_tokens=128)
        return psnr(model.decode(model.encode(pictures)), pictures)

    assert figure([32, 8, 4, 2, 2]) > figure([8, 8, 8, 8]) + 1


def test_one_look_at_photographs_makes_a_vector_codebook_useful(pictures):
    model = build(VECTOR, image_size=128, patch_size=16, num_tokens=128)
    before = psnr(model.decode(model.encode(pictures)), pictures)
    model.train()(pictures.flip(3))
    model.eval()
    assert psnr(model.decode(model.encode(pictures)), pictures) > before + 6


@pytest.mark.parametrize("scaling", ["channel", "token"])
def test_every_used_frequency_has_one_place(scaling):
    layout = lay_out((64, 64), 32, vistok.create("quantizer", **UNEQUAL), scaling)
    assert layout.index.shape == (32, 5) and len(np.unique(layout.index)) == layout.index.size


def test_finest_channel_gets_the_strongest_frequencies():
    layout = lay_out((64, 64), 32, vistok.create("quantizer", name="fsq_symmetric", levels=[2, 16, 4]), "channel")
    power = (
        expected_power((64, 64)).reshape(-1)[layout.index].min(0),
        expected_power((64, 64)).reshape(-1)[layout.index].max(0),
    )
    assert power[0][1] >= power[1][2] and power[0][2] >= power[1][0]


def test_token_layout_balances_the_tokens():
    quantizer = vistok.create("quantizer", **VECTOR)
    product = np.log(expected_power((64, 64)).reshape(-1)[lay_out((64, 64), 32, quantizer, "token").index]).sum(1)
    ranked = np.log(expected_power((64, 64)).reshape(-1)[lay_out((64, 64), 32, quantizer, "channel").index]).sum(1)
    assert np.ptp(product) < np.ptp(ranked) / 2


@pytest.mark.parametrize(("quantizer", "scaling"), [(UNEQUAL, "channel"), (VECTOR, "token")])
def test_layout_follows_the_kind_of_quantizer(quantizer, scaling):
    quantizer = vistok.create("quantizer", **quantizer)
    own, told = (lay_out((64, 64), 32, quantizer, s) for s in ("auto", scaling))
    assert np.array_equal(own.index, told.index) and torch.equal(own.gain, told.gain)


def test_more_channels_than_frequencies_leave_the_rest_empty():
    layout = lay_out((8, 8), 32, vistok.create("quantizer", "lfq", dim=8), "channel")
    assert (layout.spread > 0).sum() == 3 * 8 * 8


def test_calibration_leaves_the_quantizer_alone():
    quantizer = vistok.create("quantizer", **VECTOR).train()
    before = copy.deepcopy(quantizer.state_dict())
    calibrate(quantizer, samples=64)
    after = quantizer.state_dict()
    assert quantizer.training and all(torch.equal(before[k], after[k]) for k in before)


def test_calibration_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    calibrate(vistok.create("quantizer", **UNEQUAL), samples=64)
    assert torch.equal(state, torch.get_rng_state())


def test_synthesis_inverts_analysis_where_nothing_is_lost():
    model = build({"name": "gaussian", "dim": 24}, image_size=16)  # 32 x 24 channels hold all 3 x 16 x 16 frequencies
    images = image(2, 16)
    torch.testing.assert_close(model.decode_codes(model.encode(images).codes), images, rtol=0, atol=2e-3)


def test_ids_decode_as_their_codes_do():
    model = build()
    tokens = model.encode(image(2, 64))
    torch.testing.assert_close(model.decode(tokens.ids), model.decode_codes(tokens.codes).clamp(0, 1))


def test_ids_do_not_change_under_autocast_before_training():
    model, images = build(), image(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ids = model.encode(images).ids
    assert torch.equal(ids, model.encode(images).ids)


@pytest.mark.parametrize(
    "quantizer",
    [
        {"name": "fsq", "levels": [8, 8, 8]},
        {"name": "bsq", "dim": 12},
        {"name": "lfq", "dim": 8},
        {"name": "gaussian", "dim": 4},
        {"name": "vq", "codebook_size": 256, "dim": 12, "l2_norm": True},
        {"name": "residual", "layers": 2, "base": VECTOR},
        VECTOR,
    ],
    ids=lambda q: q["name"],
)
def test_any_quantizer_trains_with_finite_gradients(quantizer):
    model, images = build(quantizer).train(), image(2, 64)
    out = model(images)
    ((out.images - images).square().mean() + out.quantized.loss).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.encoder.head.weight.grad.abs().sum() > 0 and model.decoder.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (40, 64)])
def test_pictures_need_not_be_square(size):
    model = build(image_size=size)
    images = image(1, 96)[..., : size[0], : size[1]]
    assert model.decode(model.encode(images)).shape == images.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 60}, "60x60 is not a multiple of the patch size 8"),
        ({"patch_size": 6, "image_size": 60}, "multiple of 4, got 6"),
        ({"num_tokens": 0}, r"1\.\.12288"),
        (
            {"quantizer": {"name": "multiscale", "codebook_size": 64, "dim": 8, "scales": [1, 2, 4]}, "num_tokens": 16},
            "needs a grid of features",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_another_size_of_picture_is_refused():
    with pytest.raises(ValueError, match="64x64"):
        build().encode(image(1, 128))


def trained(quantizer):
    """A model with every part moved, so that what is saved cannot be rebuilt from the configuration."""
    model = build(quantizer).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(image(2, 64)).images - image(2, 64)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("quantizer", [UNEQUAL, VECTOR], ids=lambda q: q["name"])
def test_saved_model_is_bit_identical(tmp_path, quantizer):
    model = trained(quantizer)
    loaded = vistok.load(model.save_pretrained(tmp_path)).eval()
    images = image(2, 64)
    assert torch.equal(loaded.encode(images).ids, model.encode(images).ids)
    assert torch.equal(loaded.decode(model.encode(images)), model.decode(model.encode(images)))
    assert loaded.model_id == model.model_id


def test_copy_is_equal_and_independent():
    model = trained(UNEQUAL)
    tokens = model.encode(image(2, 64))
    twin, before = copy.deepcopy(model), model.decode(tokens)
    assert torch.equal(twin.decode(tokens), before)
    with torch.no_grad():
        twin.synthesis.curve.zero_()
    assert torch.equal(model.decode(tokens), before)


def test_decoder_is_not_part_of_the_model_id():
    model = build()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.synthesis.curve.add_(1)
        twin.decoder.head.bias.add_(1)
    twin.model_id = None
    assert twin.model_id == model.model_id


def test_builds_without_memory():
    from vistok.hub import on_meta

    model = on_meta("tokenizer", "spectral_titok_tiny")
    assert all(p.is_meta for p in model.parameters())


def test_left_over_channels_add_nothing_to_the_picture():
    quantizer = vistok.create("quantizer", "lfq", dim=8)
    synthesis = FrequencySynthesis(lay_out((8, 8), 32, quantizer, "channel"))
    codes = torch.ones(1, 32, 8)
    changed = torch.where(synthesis.spread > 0, codes, -codes)
    torch.testing.assert_close(synthesis(codes), synthesis(changed))


def test_half_precision_keeps_the_frequency_path_exact():
    tok = build()
    x = image(2, 64)
    ids = tok.encode(x).ids
    half = copy.deepcopy(tok).to(torch.bfloat16)
    assert half.analysis.vertical.dtype == torch.float32
    assert torch.equal(half.encode(x).ids, ids)  # the untrained transformer adds nothing
    torch.testing.assert_close(half.decode(ids), tok.decode(ids), rtol=0, atol=1e-6)
