"""VQ-EMA against stored steps of vector-quantize-pytorch and BSQ-ViT."""

from __future__ import annotations

import pytest
import torch

import vistok
from vistok.quantizers import ema

pytestmark = pytest.mark.parity

CASES = ["ema_ste", "ema_rot", "ema_cos", "ema_dead", "kmeans"]


@pytest.fixture
def first_tokens(monkeypatch):
    """The stored runs drew "the first tokens of the batch, cycling" instead of random ones."""

    def draw(tokens, mask, count, generator):
        return tokens[torch.arange(count) % len(tokens)]

    monkeypatch.setattr(ema, "draw_tokens", draw)


def build(ref, case):
    cfg = ref.meta["cases"][case]["config"]
    q = vistok.create(
        "quantizer",
        "vq_ema",
        codebook_size=cfg["codebook_size"],
        dim=cfg["dim"],
        decay=cfg.get("decay", 0.8),
        cosine=cfg.get("use_cosine_sim", False),
        dead_threshold=cfg.get("threshold_ema_dead_code", 0),
        kmeans_init=cfg.get("kmeans_init", False),
        kmeans_iters=cfg.get("kmeans_iters", 10),
        gradient="rotation" if cfg["rotation_trick"] else "straight_through",
        commitment_weight=cfg.get("commitment_weight", 1.0),
    )
    if f"{case}/codebook_0" in ref:
        q.set_codebook(ref[f"{case}/codebook_0"])
    return q.train()


@pytest.mark.parametrize("case", CASES)
def test_three_training_steps_match(golden, case, first_tokens):
    ref = golden("vq_ema")
    q = build(ref, case)
    for t in range(3):
        z = ref[f"{case}/z_{t}"].requires_grad_()
        out = q(z)
        assert torch.equal(out.ids, ref[f"{case}/indices_{t}"])
        torch.testing.assert_close(out.codes, ref[f"{case}/zq_{t}"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.losses["commitment"], ref[f"{case}/commit_{t}"].reshape(()), rtol=1e-5, atol=0)
        torch.testing.assert_close(out.loss, ref[f"{case}/loss_{t}"].reshape(()), rtol=1e-5, atol=0)
        (dz,) = torch.autograd.grad(out.loss, z, retain_graph=True)
        (through,) = torch.autograd.grad((out.codes * ref[f"{case}/cot_{t}"]).sum(), z)
        torch.testing.assert_close(dz, ref[f"{case}/grad_loss_{t}"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(through, ref[f"{case}/grad_cot_zq_{t}"], rtol=1e-4, atol=1e-6)
        for ours, theirs in (("codebook", "codebook"), ("cluster_size", "cluster_size"), ("codebook_sum", "embed_avg")):
            torch.testing.assert_close(getattr(q, ours), ref[f"{case}/{theirs}_after_{t}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_after_training_matches(golden, case, first_tokens):
    ref = golden("vq_ema")
    q = build(ref, case)
    for t in range(3):
        q(ref[f"{case}/z_{t}"])
    out = q.eval()(ref[f"{case}/eval_z"])
    assert torch.equal(out.ids, ref[f"{case}/eval_indices"])
    torch.testing.assert_close(out.codes, ref[f"{case}/eval_zq"], rtol=1e-5, atol=1e-6)


def test_bsqvit_ema_matches(golden):
    ref = golden("vq_ema")
    cfg = ref.meta["cases"]["bsqvit_ema"]["config"]
    q = vistok.create(
        "quantizer",
        "vq_ema",
        codebook_size=cfg["n_embed"],
        dim=cfg["embed_dim"],
        decay=cfg["decay"],
        initial_count=cfg["cluster_size_init"],
        commitment_weight=cfg["beta"],
    )
    q.set_codebook(ref["bsqvit_ema/codebook_0"])
    for t in range(3):
        z = ref[f"bsqvit_ema/z_{t}"].flatten(2).transpose(1, 2).requires_grad_()
        out = q(z)
        (dz,) = torch.autograd.grad(out.loss, z)
        torch.testing.assert_close(
            out.codes, ref[f"bsqvit_ema/zq_{t}"].flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(out.loss, ref[f"bsqvit_ema/loss_{t}"].reshape(()), rtol=1e-5, atol=0)
        grad = ref[f"bsqvit_ema/grad_loss_{t}"].flatten(2).transpose(1, 2)
        torch.testing.assert_close(dz, grad, rtol=1e-4, atol=1e-6)
        for ours, theirs in (("codebook", "codebook"), ("cluster_size", "cluster_size"), ("codebook_sum", "embed_avg")):
            torch.testing.assert_close(getattr(q, ours), ref[f"bsqvit_ema/{theirs}_after_{t}"], rtol=1e-5, atol=1e-6)
