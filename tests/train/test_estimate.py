"""The estimate of a run's cost."""

from __future__ import annotations

from tests.train.tiny import recipe
from vistok.train import checkpoint
from vistok.train.estimate import estimate
from vistok.train.loop import train


def test_estimate_adds_up_and_leaves_nothing_behind(tmp_path):
    out = tmp_path / "run"
    found = estimate(recipe(out, {"train": {"steps": 1000}}), measured=4)
    assert (found.images, found.measured) == (4000, 4)
    assert found.passes == 4000 / 34
    assert abs(found.hours * 3600 - 1000 * found.seconds_per_step) < 1e-6
    assert 0.05 < found.memory_gb < 50 and 0 <= found.data_wait < 1
    assert not out.exists()


def test_estimated_checkpoint_has_the_size_of_a_real_one(tmp_path):
    found = estimate(recipe(tmp_path), measured=1)
    train(recipe(tmp_path, {"train": {"steps": 1}}))
    files = (f for f in checkpoint.folders(tmp_path)[0].iterdir() if f.suffix in (".safetensors", ".pt"))
    real = sum(f.stat().st_size for f in files) / 1e9
    assert 0.8 * real < found.checkpoint_gb <= real


def test_time_limit_bounds_the_estimate(tmp_path):
    found = estimate(recipe(tmp_path, {"train": {"steps": 10**9, "max_seconds": 90.0}}), measured=2)
    assert found.hours == 90 / 3600 and "1 min 30 s" in str(found)
