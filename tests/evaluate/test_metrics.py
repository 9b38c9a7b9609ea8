"""Pixel and perceptual metrics against scikit-image, piq's formula and the reference table on photographs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import vistok
from tests.fill import image
from vistok.assets import AssetError
from vistok.evaluate.metric import build_metrics

# scikit-image, official lpips 0.1.4; rows as in the fixture `pairs`
REFERENCE = {
    "psnr": [34.833, 27.601, 10.338, 8.833],
    "ssim": [0.9170, 0.7766, 0.2291, -0.3125],
    "lpips_alex": [0.0279, 0.0225, 0.8330, 0.5284],
}
PIQ_MS_SSIM = [0.987462, 0.950745, 0.0, 0.0]
METRICS = ["psnr", "l1", "ssim", "ms_ssim", "lpips_alex"]


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """The cat with 16 levels, the cat shifted by a pixel, tulips, the negative cat; and four times the cat."""
    folder = Path(vistok.__file__).parent / "data" / "photos"
    wide = np.asarray(Image.open(folder / "01-cat.jpg").convert("RGB"))
    tulips = np.asarray(Image.open(folder / "12-tulips.jpg").convert("RGB"))[:256, :256]
    cat = wide[:256, :256]
    return np.stack([cat // 16 * 16 + 8, wide[:256, 1:257], tulips, 255 - cat]), np.stack([cat] * 4)


def tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2) / 255.0


@pytest.mark.parametrize("name", REFERENCE)
def test_metric_matches_the_reference_on_photographs(name, pairs):
    metric = vistok.create("metric", name)
    found = metric.update(tensor(pairs[0]), tensor(pairs[1]))
    tolerance = 1e-3 if name == "psnr" else 1e-4
    torch.testing.assert_close(found.double(), torch.tensor(REFERENCE[name]).double(), rtol=0, atol=tolerance)
    assert metric.compute() == pytest.approx(np.mean(REFERENCE[name]), abs=tolerance)


def test_ssim_and_psnr_equal_scikit_image(pairs):
    ssim = vistok.create("metric", "ssim").update(tensor(pairs[0]), tensor(pairs[1]))
    psnr = vistok.create("metric", "psnr").update(tensor(pairs[0]), tensor(pairs[1]))
    for row, (a, b) in enumerate(zip(*pairs)):
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        expected = structural_similarity(a, b, channel_axis=2, **options)
        assert float(ssim[row]) == pytest.approx(expected, abs=2e-6)
        assert float(psnr[row]) == pytest.approx(peak_signal_noise_ratio(b, a), abs=1e-6)


def test_ms_ssim_matches_stored_values_of_piq(pairs):
    # piq 0.8.0: multi_scale_ssim(x, y, data_range=1.0, reduction="none")
    found = vistok.create("metric", "ms_ssim").update(tensor(pairs[0]), tensor(pairs[1]))
    torch.testing.assert_close(found, torch.tensor(PIQ_MS_SSIM), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_figure_does_not_depend_on_the_batch_size(name):
    x, y = image(5, 176), image(5, 176, seed=1)
    whole, parts = vistok.create("metric", name), vistok.create("metric", name)
    whole.update(x, y)
    for start in (0, 2, 4):
        parts.update(x[start : start + 2], y[start : start + 2])
    assert parts.compute() == pytest.approx(whole.compute(), abs=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_equal_pictures_get_the_best_value_and_noise_a_worse_one(name):
    metric = vistok.create("metric", name)
    y = image(1, 176)
    best, worse = metric.update(y, y), metric.update((y + 0.1 * torch.randn_like(y)).clamp(0, 1), y)
    limit = metric.span[1] if metric.higher_is_better else metric.span[0]
    assert float(best) == pytest.approx(limit, abs=1e-6)
    assert (worse < best) if metric.higher_is_better else (worse > best)


@pytest.mark.parametrize("name", METRICS)
def test_reconstruction_is_clamped_and_rounded_as_a_saved_picture(name):
    metric = vistok.create("metric", name)
    y = image(1, 176)
    x = y + 0.3 * torch.randn_like(y)
    saved = (x.clamp(0, 1) * 255).round() / 255
    assert torch.equal(metric.update(x, y), metric.update(saved, y))


def test_lpips_vgg_metric_is_the_vgg_loss():
    try:
        metric = vistok.create("metric", "lpips_vgg")
    except AssetError as err:
        pytest.skip(str(err))
    x, y = image(1, 64), image(1, 64, seed=1)
    saved = [(v * 255).round() / 255 for v in (x, y)]
    assert torch.equal(metric.update(x, y), vistok.create("loss", "lpips", net="vgg")(*saved))


@pytest.mark.parity
def test_dists_of_jpeg_files_matches_the_reference():
    """Measured with the authors' network and weights on the cat at five JPEG qualities."""
    try:
        metric = vistok.create("metric", "dists")
    except AssetError as err:
        pytest.skip(str(err))
    path = Path(vistok.__file__).parent / "data" / "photos" / "01-cat.jpg"
    cat = Image.open(path).convert("RGB").crop((0, 0, 256, 256))
    files = [io.BytesIO() for _ in range(2)]
    for quality, file in zip((75, 5), files):
        cat.save(file, "JPEG", quality=quality)
    decoded = np.stack([np.asarray(Image.open(f)) for f in files])
    found = metric.update(tensor(decoded), tensor(np.stack([np.asarray(cat)] * 2)))
    torch.testing.assert_close(found, torch.tensor([0.0398, 0.428]), rtol=0, atol=6e-4)


def test_what_cannot_be_measured_is_skipped_by_name_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr("vistok.assets.carried", lambda source: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    built, skipped = build_metrics(["psnr", "ms_ssim", "dists"], size=(128, 128))
    assert list(built) == ["psnr"]
    assert "at least 161 pixels" in skipped["ms_ssim"]
    assert "pip install --no-deps dists-pytorch==0.1" in skipped["dists"]


def test_rounding_can_be_switched_off():
    y = torch.full((1, 3, 16, 16), 0.5)
    x = y + 1e-4
    assert vistok.create("metric", "psnr", rounding=False).update(x, y) == pytest.approx(80.0, abs=1e-2)


def test_psnr_is_the_mean_over_pictures_and_not_of_the_mean_error():
    y = torch.zeros(2, 3, 16, 16)
    x = torch.stack((y[0] + 10 / 255, y[0] + 100 / 255))
    metric = vistok.create("metric", "psnr")
    metric.update(x, y)
    assert metric.compute() == pytest.approx((28.1308 + 8.1308) / 2, abs=1e-3)


def test_ms_ssim_refuses_pictures_its_window_does_not_fit_into():
    with pytest.raises(ValueError, match="at least 161 x 161"):
        vistok.create("metric", "ms_ssim").update(image(1, 160), image(1, 160))


def test_ms_ssim_of_odd_sizes_is_defined():
    values = vistok.create("metric", "ms_ssim").update(image(1, 192)[..., :179, :187], image(1, 192)[..., :179, :187])
    assert values == pytest.approx(1.0, abs=1e-6)


def test_reset_forgets_and_nothing_seen_is_an_error():
    metric = vistok.create("metric", "psnr")
    metric.update(image(1, 32), image(1, 32, seed=1))
    metric.reset()
    with pytest.raises(ValueError, match="seen no picture"):
        metric.compute()


def test_metric_has_an_empty_state_dict_and_no_parameters():
    metric = vistok.create("metric", "lpips_alex")
    assert metric.state_dict() == {}
    assert not list(metric.parameters())


def test_shape_mismatch_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\).*\(1, 3, 64, 64\)"):
        vistok.create("metric", "psnr").update(image(1, 32), image(1, 64))


def test_protocol_names_definition_rounding_and_weights():
    protocol = vistok.create("metric", "lpips_alex").protocol()
    assert protocol["rounding"] == "uint8"
    assert len(protocol["weights_sha256"]) == 64
    assert "AlexNet" in protocol["definition"]
