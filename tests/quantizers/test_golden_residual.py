"""Residual and multi-scale VQ against stored outputs of the official implementations."""

from __future__ import annotations

import pytest
import torch

import vistok

pytestmark = pytest.mark.parity


def test_residual_vq_matches(golden):
    ref = golden("fsq_rvq_simvq_msvq")
    base = {"name": "vq_ema", "codebook_size": 16, "dim": 6, "decay": 0.8, "commitment_weight": 0.25}
    q = vistok.create("quantizer", "residual", base=base, layers=3)
    for index, level in enumerate(q.levels):
        level.set_codebook(ref[f"rvq/codebook_{index}"])
    z = ref["rvq/z"].requires_grad_()
    out = q(z)
    assert torch.equal(out.ids, ref["rvq/indices"])
    torch.testing.assert_close(out.codes, ref["rvq/zq"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, ref["rvq/losses"].sum(), rtol=1e-5, atol=0)
    (through,) = torch.autograd.grad((out.codes * ref["rvq/cot"]).sum(), z, retain_graph=True)
    (grad,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(through, ref["rvq/grad_cot_zq"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad, ref["rvq/grad_loss"], rtol=1e-4, atol=1e-6)
    for index, level in enumerate(q.levels):
        torch.testing.assert_close(level.codebook, ref[f"rvq/codebook_after_{index}"], rtol=1e-5, atol=1e-6)


def build_multiscale(ref):
    cfg = ref.meta["cases"]["msvq"]["config"]
    q = vistok.create(
        "quantizer",
        "multiscale",
        codebook_size=cfg["vocab_size"],
        dim=cfg["Cvae"],
        scales=cfg["v_patch_nums"],
        blend=cfg["quant_resi"],
        shared_blends=cfg["share_quant_resi"],
    )
    q.embedding.weight.data = ref["msvq/codebook"].clone()
    for index, blend in enumerate(q.blends):
        blend.conv.weight.data = ref[f"msvq/phi/qresi_ls.{index}.weight"].clone()
        blend.conv.bias.data = ref[f"msvq/phi/qresi_ls.{index}.bias"].clone()
    return q


def test_var_multiscale_vq_matches(golden):
    ref = golden("fsq_rvq_simvq_msvq")
    q = build_multiscale(ref)
    z = ref["msvq/f"].flatten(2).transpose(1, 2).requires_grad_()
    out = q(z, grid=(4, 4))
    assert torch.equal(out.ids, torch.cat([ref[f"msvq/idx_{k}"] for k in range(4)], dim=1))
    torch.testing.assert_close(out.codes, ref["msvq/f_hat"].flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, ref["msvq/loss"].reshape(()), rtol=1e-5, atol=0)
    grads = torch.autograd.grad(out.loss, [z, q.embedding.weight])
    torch.testing.assert_close(grads[0], ref["msvq/grad_loss"].flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[1], ref["msvq/grad_codebook_loss"], rtol=1e-4, atol=1e-6)


def test_var_ids_decode_to_the_same_features(golden):
    ref = golden("fsq_rvq_simvq_msvq")
    ids = torch.cat([ref[f"msvq/idx_{k}"] for k in range(4)], dim=1)
    codes = build_multiscale(ref).ids_to_codes(ids, grid=(4, 4))
    torch.testing.assert_close(codes, ref["msvq/f_hat"].flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6)
