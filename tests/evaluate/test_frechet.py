"""Frechet distances: the formula, the streaming statistics, reference files, networks."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

import vistok
from tests.fill import fill, image
from vistok.assets import AssetError
from vistok.evaluate.fid import FeatureStatistics, Moments, frechet_distance, read_statistics, save_statistics


def features(n: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) @ mix + shift


def moments(x: torch.Tensor, batch: int = 7) -> Moments:
    statistics = FeatureStatistics(x.shape[1])
    for part in x.split(batch):
        statistics.update(part)
    return statistics.moments()


def textbook(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real))


@pytest.mark.parametrize(("n", "m"), [(100, 120), (10, 8), (10, 100), (100, 10)])
def test_distance_equals_the_textbook_formula(n, m):
    x, y = features(n, 16, 0), features(m, 16, 1, shift=0.5)
    # the square root of a singular matrix costs scipy half of its digits
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(textbook(x, y), rel=1e-5)


def test_few_and_many_pictures_take_different_ways_to_one_result():
    x, y = moments(features(10, 16, 0)), moments(features(12, 16, 1))
    assert x.factor is not None
    whole = [Moments(mean=m.mean, covariance=m.covariance) for m in (x, y)]
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(*whole), rel=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(x, whole[1]), rel=1e-6)


def test_distance_of_shifted_gaussians_is_the_squared_shift():
    x = features(200, 8, 0)
    assert frechet_distance(moments(x), moments(x + 2.0)) == pytest.approx(8 * 4.0, rel=1e-5)


def test_distance_of_scaled_gaussians_is_known():
    x = features(200, 8, 0)
    x = x - x.mean(0)
    expected = float((x.double().square().sum() / 199) * (3 - 1) ** 2)
    assert frechet_distance(moments(x), moments(3 * x)) == pytest.approx(expected, rel=1e-5)


def test_distance_to_itself_is_zero():
    x = moments(features(50, 16, 0))
    assert frechet_distance(x, x) < 1e-6


def test_statistics_do_not_depend_on_batches_and_equal_numpy():
    x = features(60, 12, 3)
    for batch in (1, 7, 60):
        found = moments(x, batch)
        np.testing.assert_allclose(found.covariance.numpy(), np.cov(x.double().numpy(), rowvar=False), atol=1e-10)


def test_features_are_dropped_once_they_outnumber_their_width():
    statistics = FeatureStatistics(8)
    statistics.update(features(7, 8, 0))
    assert statistics.moments().factor is not None
    statistics.update(features(7, 8, 1))
    assert statistics.moments().factor is None


def test_different_networks_are_refused():
    with pytest.raises(ValueError, match="8 and of 16 features"):
        frechet_distance(moments(features(9, 8, 0)), moments(features(9, 16, 0)))


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        FeatureStatistics(2).update(torch.tensor([[math.nan, 0.0]]))


def test_one_picture_has_no_covariance():
    statistics = FeatureStatistics(2)
    statistics.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least two"):
        statistics.moments()


def test_statistics_survive_their_file(tmp_path):
    before = moments(features(30, 8, 0))
    save_statistics(tmp_path / "ref.npz", before, feature="toy")
    after = read_statistics(tmp_path / "ref.npz")
    assert after.n == 30
    assert torch.equal(after.covariance, before.covariance) and torch.equal(after.mean, before.mean)


@pytest.mark.parametrize(
    "extra", [{}, {"arr_0": np.zeros((1, 2, 2, 3), np.uint8), "mu_s": np.zeros(3)}], ids=["pytorch-fid", "adm"]
)
def test_foreign_reference_files_are_read(tmp_path, extra):
    np.savez(tmp_path / "ref.npz", mu=np.arange(3.0), sigma=np.eye(3, dtype=np.float32), **extra)
    found = read_statistics(tmp_path / "ref.npz")
    assert found.n is None
    assert found.mean.tolist() == [0, 1, 2] and found.covariance.dtype == torch.float64


def test_reference_file_of_pictures_alone_is_refused(tmp_path):
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="arr_0 but no 'mu'"):
        read_statistics(tmp_path / "ref.npz")


def test_damaged_reference_file_is_refused(tmp_path):
    (tmp_path / "ref.npz").write_bytes(b"PK not an archive")
    with pytest.raises(ValueError, match="cannot be read"):
        read_statistics(tmp_path / "ref.npz")


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> str:
    """The FID network's weight file with filled weights."""
    network = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(filled_inception(network), path)
    return str(path)


def filled_inception(network) -> dict[str, torch.Tensor]:
    """Names and shapes come from a bare instance, since the constructor wants a weight file."""
    shapes: dict[str, tuple[int, ...]] = {}

    class Bare(network.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            shapes.update({k: tuple(v.shape) for k, v in self.state_dict().items()})

    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    Bare("bare", ["2048"], feature_extractor_weights_path=file)
    table = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            table[key] = torch.zeros(shape, dtype=torch.int64)
        else:
            table[key] = torch.from_numpy(fill(key, shape)) * (1.4 if len(shape) == 4 else 1.0)
    return table


@pytest.mark.parity
@pytest.mark.parametrize(("resize", "array"), [("tensorflow", "torch_fidelity"), ("pytorch_fid", "pytorch_fid")])
def test_inception_features_equal_both_public_implementations(golden, inception, resize, array):
    want = golden("inception_features")[array]
    metric = vistok.create("metric", "rfid", weights=inception, resize=resize)
    found = metric.features((image(4, 64, 5) * 255).round().to(torch.uint8))
    assert float((found - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parity
def test_rfid_counts_and_names_itself_by_the_number_of_pictures(golden, inception):
    metric = vistok.create("metric", "rfid", weights=inception)
    pictures = image(4, 64, 5)
    assert metric.update(pictures, pictures).shape == (0,)
    assert metric.compute() < 1e-6
    assert "N=4, too few for rFID" in metric.label
    p = golden("inception_features")["logits"].double().softmax(1)
    expected = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert metric.details()["inception_score"] == pytest.approx(float(expected), rel=1e-4)
    for n, label in ((5000, "rFID (N=5000)"), (50_000, "rFID")):
        metric.count.fill_(n)
        assert metric.label == label


def test_missing_inception_weights_say_how_to_supply_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(AssetError, match="VISTOK_INCEPTION="):
        vistok.create("metric", "rfid")


def test_frechet_distance_of_unrounded_pictures_is_refused():
    with pytest.raises(ValueError, match="8-bit"):
        vistok.create("metric", "fd_effnet_lite0", rounding=False)


@pytest.mark.parity
def test_fd_effnet_lite0_of_jpeg_50_matches_the_reference(photos):
    """29.7: the 42 photographs, top-left 256 px, against themselves as JPEG of quality 50."""
    try:
        metric = vistok.create("metric", "fd_effnet_lite0")
    except AssetError as err:
        pytest.skip(str(err))

    def tensor(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture.crop((0, 0, 256, 256))).copy()).permute(2, 0, 1) / 255

    pictures = [Image.open(p).convert("RGB") for p in photos]
    for start in range(0, len(pictures), 14):
        part = pictures[start : start + 14]
        files = [io.BytesIO() for _ in part]
        for picture, file in zip(part, files):
            picture.save(file, "JPEG", quality=50)
        metric.update(torch.stack([tensor(Image.open(f)) for f in files]), torch.stack([tensor(p) for p in part]))
    assert metric.compute() == pytest.approx(29.7, abs=0.1)
    assert metric.label == "FD EfficientNet-Lite0 (N=42)"
