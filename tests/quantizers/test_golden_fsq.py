"""FSQ and Gaussian latents against stored outputs of the official implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vistok

pytestmark = pytest.mark.parity

SETS = ["8-8-8-5-5-5", "8-6-5", "8-5-5-5", "5-5-5-5-5", "4-4-4", "3-3-3-3", "2-2-2"]


def run_flextok(golden, name):
    ref = golden("fsq")
    levels = ref.meta["sets"][name]["levels"]
    n, d, seed = ref.meta["n"], len(levels), ref.meta["seed"]
    z = (np.random.default_rng([seed, *levels]).standard_normal((n, d)) * ref.meta["scale"]).astype(np.float32)
    w = np.random.default_rng([seed + 1, *levels]).standard_normal((n, d)).astype(np.float32)
    z = torch.from_numpy(z).unsqueeze(0).requires_grad_()
    q = vistok.create("quantizer", "fsq", levels=levels)
    return ref, q, z, torch.from_numpy(w)


@pytest.mark.parametrize("name", SETS)
def test_flextok_codes_and_ids_match(golden, name):
    ref, q, z, _ = run_flextok(golden, name)
    out = q(z)
    bounded = q.bound(z)
    torch.testing.assert_close(bounded[0], ref[f"{name}_bounded"], rtol=0, atol=2e-6)
    assert torch.equal(out.ids[0], ref[f"{name}_indices"])
    torch.testing.assert_close(out.codes[0], ref[f"{name}_codes"], rtol=0, atol=1e-6)
    torch.testing.assert_close(q.ids_to_codes(out.ids)[0], ref[f"{name}_codes_from_indices"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_flextok_straight_through_gradient_matches(golden, name):
    ref, q, z, w = run_flextok(golden, name)
    (q(z).codes[0] * w).sum().backward()
    torch.testing.assert_close(z.grad[0], ref[f"{name}_ste_grad"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SETS)
def test_codebook_enumerates_in_the_official_order(golden, name):
    ref, q, _, _ = run_flextok(golden, name)
    ids = torch.arange(0, q.vocab_sizes[0], ref.meta["sets"][name]["codebook_stride"])
    torch.testing.assert_close(q.ids_to_codes(ids.unsqueeze(0))[0], ref[f"{name}_codebook_sample"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["fsq8555", "fsq_cosmos", "fsq_sym", "fsq_groups"])
def test_vector_quantize_pytorch_fsq_matches(golden, case):
    ref = golden("fsq_rvq_simvq_msvq")
    cfg = ref.meta["cases"][case]["config"]
    kind = "fsq_symmetric" if cfg.get("preserve_symmetry") else "fsq"
    q = vistok.create("quantizer", kind, levels=cfg["levels"], groups=cfg["num_codebooks"])
    z, zq, cot, grad, decoded = (
        ref[f"{case}/{k}"].flatten(2).transpose(1, 2) for k in ("z", "zq", "cot", "grad_cot_zq", "decoded")
    )
    z.requires_grad_()
    out = q(z)
    (out.codes * cot).sum().backward()
    ids = ref[f"{case}/indices"].flatten(1, 2)
    assert torch.equal(out.ids, ids)
    torch.testing.assert_close(out.codes, zq, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad, grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.ids_to_codes(ids), decoded, rtol=1e-5, atol=1e-6)


def test_gaussian_moments_and_kl_match_titok(golden):
    ref = golden("titok_vae")
    q = vistok.create("quantizer", "gaussian", dim=16)
    z = ref["z"].squeeze(2).transpose(1, 2)
    mean, logvar = q.moments(z)
    rng = np.random.default_rng(77).standard_normal((2, 16, 1, 64)).astype(np.float32)
    sample = mean + torch.exp(0.5 * logvar) * torch.from_numpy(rng).squeeze(2).transpose(1, 2)
    torch.testing.assert_close(mean, ref["mean"].squeeze(2).transpose(1, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sample, ref["sample"].squeeze(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.kl(z), ref["kl"].reshape(2, 64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q(z).losses["kl"], ref["kl"].reshape(2, 64).sum(1).mean(), rtol=1e-5, atol=1e-4)
