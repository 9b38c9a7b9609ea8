"""Two gloo processes equal one process on the joint batch."""

from __future__ import annotations

import time

import pytest
import torch
import torch.multiprocessing as mp

from tests.quantizers import two_processes as tp
from tests.quantizers.zoo import build

pytestmark = pytest.mark.dist

CASES = sorted(
    f"{kind}/{split}/{masked}"
    for kind in tp.DETERMINISTIC
    for split in tp.SPLITS
    for masked in ("whole", "masked")
    if not (kind == "multiscale" and masked == "masked")
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both processes."""
    folder = tmp_path_factory.mktemp("gloo")
    context = mp.spawn(tp.work, args=(str(folder),), nprocs=2, join=False)
    deadline = time.monotonic() + 240  # start-up included; they share the machine with other tests
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                pytest.fail("the two processes hang")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"rank{r}.pt") for r in range(2)]


@pytest.fixture(scope="module")
def joint():
    return tp.one_step_each(None)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_on_the_joint_batch(ranks, joint, case):
    expected = joint[case]
    first, second = (r["steps"][case] for r in ranks)
    for key, want in expected.items():
        if key == "z":  # DDP averages gradients, so each process' share carries a factor of two
            found = torch.cat([first[key], second[key]]) / 2
        elif key.startswith(("loss", "param")):
            found = (first[key] + second[key]) / 2
        else:
            assert torch.equal(first[key], second[key]), f"{key} differs between the processes"
            found = first[key]
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize("kind", ["vq_ema", "cvq", "residual_dropout"])
def test_codebooks_stay_bit_equal_over_fifty_uneven_steps(ranks, kind):
    first, second = (r[kind] for r in ranks)
    assert all(torch.equal(first[k], second[k]) for k in first)
    start = build(kind).state_dict()
    assert any(not torch.equal(first[k], start[k]) for k in first)


def test_codes_were_revived_on_both_processes_within_the_fifty_steps(ranks):
    # 64 codes, at most 60 tokens a step, threshold 1: without revival no step leaves every average at 1 or more
    assert all((r["vq_ema"]["cluster_size"] >= 1).all() for r in ranks)


def test_uneven_batches_are_through_within_a_minute(ranks):
    assert max(r["seconds"] for r in ranks) < 60


def test_tokens_are_drawn_once_from_both_processes(ranks):
    first, second = (r["tokens"] for r in ranks)
    assert torch.equal(first, second)
    drawn = first.long().tolist()
    assert len(set(drawn)) == 32
    assert set(drawn) <= set(range(50))
    assert min(drawn) < 20 <= max(drawn)


def test_quantize_dropout_draws_the_same_levels(ranks):
    assert torch.equal(ranks[0]["levels"], ranks[1]["levels"])
    assert len(set(ranks[0]["levels"].tolist())) > 1


def test_a_quantizer_built_before_the_process_group_is_synchronised(ranks, joint):
    loss = (ranks[0]["early"]["loss"] + ranks[1]["early"]["loss"]) / 2
    torch.testing.assert_close(loss, joint["lfq/even/whole"]["loss"])


def test_ddp_gives_the_gradient_of_the_joint_batch(ranks, joint):
    assert torch.equal(ranks[0]["ddp"], ranks[1]["ddp"])
    torch.testing.assert_close(ranks[0]["ddp"], joint["vq_entropy/uneven/whole"]["param 0"], rtol=1e-4, atol=1e-6)
