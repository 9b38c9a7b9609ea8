"""Two processes with half of the pictures each give the figures of one with all of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import vistok
from tests.fill import image
from vistok.evaluate.fid import FeatureStatistics, Moments, frechet_distance
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


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x, y, ids, logits = everything()
    rows = slice(0, 2) if rank == 0 else slice(2, 5)  # unequal shares: the sums must not care
    found = figures(x[rows], y[rows], ids[rows], logits[2 * rank : 2 * rank + 2])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_give_the_figures_of_one(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    alone = figures(*everything())
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(alone, rel=1e-6)
