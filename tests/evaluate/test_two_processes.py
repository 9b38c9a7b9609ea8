"""Two processes with half of the pictures each give the figures of one with all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import vistok
from tests.evaluate.test_run import Cells
from tests.fill import image
from vistok.evaluate.fid import FeatureStatistics, Moments, frechet_distance
from vistok.evaluate.run import EvalResult, evaluate
from vistok.evaluate.usage import CodebookUsage

METRICS = ("psnr", "ssim", "lpips_alex")


def figures(x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> dict:
    """Every figure that communicates, over the rows given."""
    found = {}
    for name in METRICS:
        metric = vistok.create("metric", name)
        metric.update(x, y)
        metric.gather()
        found[name] = metric.compute()
    statistics = FeatureStatistics(32)
    statistics.update(x[:, :, :2, :].flatten(1)[:, :32])
    statistics.gather()
    moments = statistics.moments()
    whole = replace(moments, factor=None)
    zero = Moments(mean=torch.zeros(32).double(), covariance=torch.eye(32).double())
    found |= {"frechet": frechet_distance(moments, zero), "frechet_from_covariance": frechet_distance(whole, zero)}
    usage = CodebookUsage((16,))
    usage.update(ids)
    usage.gather()
    found |= usage.compute()
    gan = vistok.create("loss", "hinge_gan", lecam=1.0)
    weight = torch.ones((), requires_grad=True)
    for _ in range(2):
        weight.grad = None
        gan.discriminator(weight * logits, -weight * logits).lecam.backward()
    if dist.is_initialized():
        dist.all_reduce(weight.grad)
        weight.grad /= dist.get_world_size()
    return found | {"lecam_gradient": float(weight.grad), "real_mean": float(gan.real_mean)}


def everything() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, y = image(5, 64), image(5, 64, seed=1)
    return x, y, torch.randint(16, (5, 7), generator=generator), torch.rand(4, 3, generator=generator)


def run(pictures: list[Path], out: Path, batch: int) -> EvalResult:
    """The whole evaluation; the last picture is broken."""
    return evaluate(Cells(), pictures, metrics=("psnr", "ssim"), out=out, batch=batch, command="same")


def broken(folder: Path) -> Path:
    (folder / "broken.jpg").write_text("no picture")
    return folder / "broken.jpg"


def work(rank: int, folder: str, pictures: list[Path]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, y, ids, logits = everything()
    rows = slice(0, 2) if rank == 0 else slice(2, 5)  # unequal shares: the sums must not care
    found = figures(x[rows], y[rows], ids[rows], logits[2 * rank : 2 * rank + 2])
    torch.save(found, Path(folder) / f"{rank}.pt")
    run(pictures, Path(folder) / "two", batch=2)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, photos: list[Path]) -> Path:
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(work, args=(str(folder), [*photos[:5], broken(folder)]), nprocs=2)
    return folder


@pytest.mark.dist
def test_two_processes_give_the_figures_of_one(two: Path) -> None:
    alone = figures(*everything())
    for rank in range(2):
        assert torch.load(two / f"{rank}.pt") == pytest.approx(alone, rel=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("batch", [1, 5])
def test_an_evaluation_does_not_depend_on_processes_and_batches(
    two: Path, photos: list[Path], tmp_path: Path, batch: int
) -> None:
    run([*photos[:5], two / "broken.jpg"], tmp_path, batch)
    found, alone = (json.loads((f / "metrics.json").read_text()) for f in (two / "two", tmp_path))
    assert (found["protocol"]["settings"].pop("processes"), alone["protocol"]["settings"].pop("processes")) == (2, 1)
    for facts in (found, alone):
        del facts["speed"], facts["protocol"]["settings"]["batch"]
    for key in ("figures", "baselines", "usage", "rate"):
        assert found.pop(key) == pytest.approx(alone.pop(key), abs=5e-4)
    for metric, interval in found.pop("intervals").items():
        assert interval == pytest.approx(alone["intervals"][metric], abs=5e-4)
    del alone["intervals"]
    assert found == alone
    rows = [
        [json.loads(line) for line in (f / "pictures.jsonl").read_text().splitlines()] for f in (two / "two", tmp_path)
    ]
    assert [row["file"] for row in rows[0]] == [row["file"] for row in rows[1]]
    names = [
        [line for line in (f / "report.html").read_text().splitlines() if "<figcaption" in line]
        for f in (two / "two", tmp_path)
    ]
    assert names[0] == names[1]


@pytest.mark.dist
@pytest.mark.slow
def test_the_command_under_a_launcher_gives_the_figures_of_one_process(photos: list[Path], tmp_path: Path) -> None:
    vistok.create("tokenizer", "titok_tiny").eval().save_pretrained(tmp_path / "tokenizer")
    command = ["-m", "vistok", "eval", str(tmp_path / "tokenizer"), "--metrics", "psnr,ssim"]
    command += ["--data", ",".join(map(str, photos[:5]))]  # uneven shares
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    ways = {"two": [*launcher, *command], "one": [*command, "--batch", "1"], "whole": [*command, "--batch", "5"]}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    facts = {}
    for name, words in ways.items():
        run_words = [sys.executable, *words, "--out", str(tmp_path / name)]
        done = subprocess.run(run_words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        facts[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert facts["two"]["protocol"]["settings"]["processes"] == 2
    for name in ("two", "whole"):
        for key in ("figures", "usage", "rate"):
            assert facts[name][key] == pytest.approx(facts["one"][key], abs=5e-4)
        rows = (tmp_path / name / "pictures.jsonl").read_text().splitlines()
        assert [json.loads(row)["file"] for row in rows] == [photo.name for photo in photos[:5]]
