"""Protocols of published figures: what they fix, what they measure, what happens without weights."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vistok
from tests.evaluate.test_frechet import inception  # noqa: F401
from tests.evaluate.test_run import Cells
from tests.test_cli import failed, ran
from vistok import assets
from vistok.evaluate import reference
from vistok.evaluate.distribution import resized
from vistok.evaluate.fid import Moments, frechet_distance, save_statistics
from vistok.evaluate.inception_score import InceptionScore
from vistok.evaluate.protocols import PROTOCOLS, find, published
from vistok.evaluate.run import evaluate


def logits(n: int) -> torch.Tensor:
    return 3 * torch.randn(n, 1008, generator=torch.Generator().manual_seed(0))


def textbook(rows: torch.Tensor) -> float:
    p = rows.double().softmax(1)
    return float((p * (p / p.mean(0)).log()).sum(1).mean().exp())


def scored(rule: str, rows: torch.Tensor) -> dict[str, float]:
    score = InceptionScore(rule)
    for part in rows.split(7):
        score.update(part)
    return score.compute()


def test_score_over_all_pictures_is_the_textbooks():
    assert scored("whole", logits(40))["inception_score"] == pytest.approx(textbook(logits(40)), rel=1e-9)


@pytest.mark.parametrize("n", [40, 47, 3])
def test_torch_fidelity_score_is_torch_fidelitys(n):
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc", reason="torch-fidelity is not installed")
    want = metric_isc.isc_features_to_metric(logits(n), splits=min(10, n))
    found = scored("torch_fidelity", logits(n))
    assert found["inception_score"] == pytest.approx(want["inception_score_mean"], rel=1e-9)
    assert found["inception_score_std"] == pytest.approx(want["inception_score_std"], abs=1e-9)


def test_adm_score_is_the_mean_over_consecutive_parts(monkeypatch):
    monkeypatch.setattr("vistok.evaluate.inception_score.PART", 16)
    rows = logits(40)
    want = np.mean([textbook(part) for part in rows.split(16)])
    assert scored("adm", rows)["inception_score"] == pytest.approx(want, rel=1e-9)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="whole, torch_fidelity, adm, got 'tenths'"):
        InceptionScore("tenths")


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (400, 400)])
def test_clean_resize_is_pillows_on_floats(size, photos):
    picture = np.array(Image.open(photos[1]).convert("RGB").resize(size))
    planes = [Image.fromarray(picture[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC) for c in range(3)]
    want = (np.stack([np.asarray(plane).clip(0, 255) for plane in planes]) - 128) / 128
    found = resized(torch.from_numpy(picture).permute(2, 0, 1)[None], "clean")[0].numpy()
    assert np.abs(found - want).max() < 1e-4


def test_every_protocol_says_what_it_fixes():
    wanted = {"pictures", "resize and crop", "reconstructions", "network", "features", "resize for the network"}
    for protocol in PROTOCOLS.values():
        fixed = protocol.fixes()
        assert wanted | {"reference", "Inception score", "source"} <= set(fixed)
        assert "6726825d" in fixed["network"] and all(fixed.values())
    assert all(word in find("adm").fixes()["reference"] for word in ("b3273271", "VIRTUAL_imagenet256_labeled.npz"))
    with pytest.raises(KeyError, match="No protocol named 'cleanfid'. Did you mean .*clean_fid"):
        find("cleanfid")


def test_every_published_row_has_a_command_that_is_understood():
    rows = published()
    some = {"titok_s128.in1k", "one_d_piece_s256.in1k", "gigatok_ss.in1k", "wetok_r24.general"}
    assert some <= {row.model for row in rows}
    for row in rows:
        words = shlex.split(row.command)
        assert words[:3] == ["vistok", "eval", row.model]
        assert words[words.index("--protocol") + 1] in PROTOCOLS and row.source
        assert row.protocol in ("", *PROTOCOLS)
    assert next(r for r in rows if r.model.startswith("ta_titok")).command.endswith("--caption 'A photo of a {class}.'")


def test_the_lists_are_printed(capsys: Any) -> None:
    said = ran(capsys, "list", "--protocols")
    assert all(name in said for name in PROTOCOLS) and "mean over parts of 5,000" in said
    table = ran(capsys, "list", "tokenizer", "titok*", "--published", "--markdown")
    assert "| titok_s128.in1k | rFID 1.71 | titok | vistok eval titok_s128.in1k --protocol titok" in table
    assert "gigatok" not in table
    assert "No tokenizer with a published rFID fits 'nothing'" in failed(capsys, "list", "nothing", "--published")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


@pytest.fixture
def weights(inception, monkeypatch):  # noqa: F811
    monkeypatch.setenv("VISTOK_INCEPTION", inception)


def measured(photos, out: Path, protocol: str, **options) -> Any:
    return evaluate(Cells(), photos[:4], metrics=("psnr",), out=out, conditions=find(protocol), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "adm"])
def test_a_protocol_measures_what_its_settings_say(photos, tmp_path, cache, weights, name):
    result = measured(photos, tmp_path / "out", name)
    metric = vistok.create("metric", "rfid", **PROTOCOLS[name].rfid)
    tokenizer = Cells()
    pictures = torch.stack([tokenizer.preprocess(photo) for photo in photos[:4]])
    metric.update(tokenizer.decode(tokenizer.encode(pictures)), pictures)
    assert result.figures["rfid"] == pytest.approx(metric.compute(), rel=1e-6)
    assert result.details["rfid"] == pytest.approx(metric.details())
    facts = json.loads(result.files["metrics"].read_text())["protocol"]
    assert facts["published"]["name"] == name
    assert facts["published"]["deviations"] == ["4 pictures instead of 50000"]
    assert facts["metrics"]["rfid"]["weights_sha256"] == metric.weights_sha256


@pytest.mark.slow
def test_adm_compares_with_its_reference_batch(photos, tmp_path, cache, weights, monkeypatch):
    moments = Moments(mean=torch.zeros(2048).double(), covariance=torch.eye(2048).double())
    save_statistics(tmp_path / "virtual.npz", moments, feature="x")
    monkeypatch.setenv("VISTOK_ADM_IMAGENET256", str(tmp_path / "virtual.npz"))
    result = measured(photos, tmp_path / "out", "adm")
    facts = json.loads(result.files["metrics"].read_text())["protocol"]["metrics"]["rfid"]
    assert facts["against"] == "the file virtual.npz"
    assert facts["reference_sha256"] == assets.sha256(tmp_path / "virtual.npz")
    assert result.figures["rfid"] > 0 and not cache.exists()


def test_without_weights_the_metric_is_left_out_by_name(photos, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = measured(photos, tmp_path / "out", "titok")
    assert "rfid" not in result.figures and result.figures["psnr"] > 0
    assert "VISTOK_INCEPTION=/path/to/file" in result.unmeasured["rfid"]
    found = json.loads(result.files["metrics"].read_text())
    assert found["unmeasured"] == result.unmeasured and found["protocol"]["published"]["name"] == "titok"
    assert "rfid is left out" in result.files["report"].read_text()


def test_the_command_names_what_it_left_out(capsys: Any, photos, tmp_path, cache, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = vistok.create("tokenizer", "titok_tiny").eval().save_pretrained(tmp_path / "model")
    words = ["eval", model, "--data", photos[0], "--metrics", "psnr", "--protocol", "clean_fid"]
    said = ran(capsys, *words, "--out", tmp_path / "out")
    assert "Left out, rfid: " in said and "VISTOK_INCEPTION=" in said
    assert "No protocol named 'adn'" in failed(capsys, *words[:-1], "adn", "--out", tmp_path / "b")
    line = failed(capsys, "eval", model, "--data", photos[0], "--metrics", "rfid", "--out", tmp_path / "c")
    assert "rfid cannot be measured: " in line and "VISTOK_INCEPTION=" in line


class Pooled(torch.nn.Module):
    """Stands for a network: 48 pooled values."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(pictures.float() / 255, 4).flatten(1)


@pytest.fixture
def pooled(scratch_registry):
    from vistok.evaluate.distribution import FrechetMetric
    from vistok.registry import register

    @register("metric", "pooled")
    class PooledDistance(FrechetMetric):
        title, dim, definition = "pooled distance", 48, "toy"
        looks = 0

        def __init__(self, *, rounding: bool = True, reference: Path | None = None) -> None:
            super().__init__(rounding=rounding, reference=reference)
            self.network, self.weights_sha256 = Pooled(), "1234"

        def features(self, pictures):
            type(self).looks += len(pictures)
            return self.network(pictures)

    return PooledDistance


def distance(photos, out: Path, **options) -> float:
    return evaluate(Cells(), photos, metrics=("psnr", "pooled"), out=out, **options).figures["pooled"]


def test_originals_are_looked_at_once(photos, tmp_path, cache, pooled):
    first = distance(photos[:5], tmp_path / "a")
    assert pooled.looks == 10
    assert distance(photos[:5], tmp_path / "b") == first
    assert pooled.looks == 15
    facts = [json.loads((tmp_path / n / "metrics.json").read_text())["protocol"]["metrics"]["pooled"] for n in "ab"]
    assert facts[0] == facts[1] and len(facts[0]["statistics"]) == 64


@pytest.mark.parametrize("damage", ["truncate", "flip", "rename"])
def test_damaged_statistics_are_never_trusted(photos, tmp_path, cache, pooled, damage):
    first = distance(photos[:5], tmp_path / "a")
    (file,) = cache.glob("*.stats")
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-40] ^= 1
        file.write_bytes(data)
    else:  # the statistics of other pictures under this name
        distance(photos[5:9], tmp_path / "o")
        (other,) = set(cache.glob("*.stats")) - {file}
        file.write_bytes(other.read_bytes())
    pooled.looks = 0
    assert distance(photos[:5], tmp_path / "b") == first
    assert pooled.looks == 10
    pooled.looks = 0
    distance(photos[:5], tmp_path / "c")
    assert pooled.looks == 5


def test_statistics_are_computed_anew_when_anything_changes(photos, tmp_path, cache, pooled):
    copies = []
    for photo in photos[:4]:
        copies.append(tmp_path / "set" / photo.name)
        copies[-1].parent.mkdir(exist_ok=True)
        copies[-1].write_bytes(photo.read_bytes())
    distance(copies, tmp_path / "a")
    copies[2].write_bytes(photos[9].read_bytes())  # the same name, another picture
    pooled.looks = 0
    changed = distance(copies, tmp_path / "b")
    assert pooled.looks == 8
    sizes = {reference.key_of(pooled(), "a", Cells(size).preprocess) for size in (32, 64)}
    assert len(sizes) == 2
    keys = [reference.key_of(pooled(), data, Cells().preprocess) for data in ("a", "b")]
    assert keys[0] != keys[1]
    assert distance(copies, tmp_path / "d") == changed


def test_another_folder_can_be_the_reference(photos, tmp_path, cache, pooled):
    (tmp_path / "set").mkdir()
    for photo in photos[5:9]:
        (tmp_path / "set" / photo.name).write_bytes(photo.read_bytes())
    found = distance(photos[:5], tmp_path / "a", reference=tmp_path / "set")
    assert distance(photos[:5], tmp_path / "b", reference=tmp_path / "set") == found
    tokenizer = Cells()
    metrics = [pooled() for _ in range(2)]
    for metric, part in zip(metrics, (photos[:5], photos[5:9])):
        pictures = torch.stack([tokenizer.preprocess(photo) for photo in part])
        metric.update(tokenizer.decode(tokenizer.encode(pictures)), pictures)
    assert found == pytest.approx(frechet_distance(metrics[0].fake.moments(), metrics[1].real.moments()), rel=1e-6)
    facts = json.loads((tmp_path / "a" / "metrics.json").read_text())["protocol"]["metrics"]["pooled"]
    assert facts["against"] == f"the pictures of {tmp_path / 'set'}"


def test_a_file_of_statistics_can_be_the_reference(photos, tmp_path, cache, pooled):
    save_statistics(tmp_path / "ref.npz", moments_of(pooled(), photos[5:9]), feature="toy")
    (tmp_path / "set").mkdir()
    for photo in photos[5:9]:
        (tmp_path / "set" / photo.name).write_bytes(photo.read_bytes())
    found = distance(photos[:5], tmp_path / "a", reference=tmp_path / "ref.npz")
    assert found == pytest.approx(distance(photos[:5], tmp_path / "b", reference=tmp_path / "set"), rel=1e-9)
    facts = json.loads((tmp_path / "a" / "metrics.json").read_text())["protocol"]["metrics"]["pooled"]
    assert facts["against"] == "the file ref.npz" and len(facts["reference_sha256"]) == 64


def moments_of(metric, photos):
    metric.real.update(metric.features(metric.eight_bit(torch.stack([Cells().preprocess(photo) for photo in photos]))))
    return metric.real.moments()


def test_a_reference_that_does_not_fit_is_refused_before_any_picture(photos, tmp_path, pooled):
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match="statistics of 7 features, pooled distance has 48"):
        distance(photos[:5], tmp_path / "a", reference=tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"for Frechet distances, e.g. rfid; none is among \['psnr'\]"):
        evaluate(Cells(), photos[:2], metrics=("psnr",), out=tmp_path / "b", reference=tmp_path / "other.npz")
    assert pooled.looks == 0


def test_what_a_metric_found_besides_is_on_the_page(photos, tmp_path, cache, pooled, monkeypatch):
    monkeypatch.setattr(pooled, "details", lambda metric: {"inception_score": 7.125, "n": 5})
    result = evaluate(Cells(), photos[:5], metrics=("psnr", "pooled"), out=tmp_path / "out")
    assert result.besides == {"inception_score": 7.125}
    assert "<td>inception score</td>" in result.files["report"].read_text()


def test_a_class_in_the_caption_is_the_pictures_folder(tmp_path):
    from vistok.cli.evaluate import captions

    files = [tmp_path / "tench" / "1.jpg", tmp_path / "goldfish" / "2.jpg"]
    assert captions("A photo of a {class}.", files) == {
        files[0]: "A photo of a tench.",
        files[1]: "A photo of a goldfish.",
    }
    assert captions("words", files) == "words"


def test_rfid_of_unrounded_pictures_needs_its_own_resize():
    with pytest.raises(ValueError, match="takes 8-bit pictures"):
        vistok.create("metric", "rfid", quantise=False)


@pytest.mark.dist
def test_the_order_of_two_processes_is_that_of_one(tmp_path):
    code = f"""
import sys, torch, torch.distributed as dist
from tests.evaluate.test_protocols import logits
from vistok.evaluate.inception_score import InceptionScore
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
score = InceptionScore("torch_fidelity")
score.update(logits(41)[rank::2])
score.gather()
print(score.compute()["inception_score"])
dist.destroy_process_group()
"""
    both = [subprocess.Popen([sys.executable, "-c", code, str(r)], stdout=subprocess.PIPE, text=True) for r in (0, 1)]
    found = [float(process.communicate(timeout=120)[0]) for process in both]
    assert found == pytest.approx([scored("torch_fidelity", logits(41))["inception_score"]] * 2, rel=1e-9)


def test_missing_reference_statistics_say_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(assets.AssetError, match="VISTOK_ADM_IMAGENET256=.*VIRTUAL_imagenet256_labeled.npz"):
        assets.find("adm_imagenet256")
