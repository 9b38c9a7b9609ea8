"""IBQ and SimVQ against stored outputs of the official implementations."""

from __future__ import annotations

import pytest
import torch

import vistok

pytestmark = pytest.mark.parity


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def run(golden, case):
    ref = golden("ibq")
    cfg = ref.meta["cases"][case]["config"]
    q = vistok.create(
        "quantizer",
        "ibq",
        codebook_size=cfg["n_e"],
        dim=cfg["e_dim"],
        beta=cfg["beta"],
        entropy_weight=0.05 if cfg["use_entropy_loss"] else 0.0,
        entropy_temperature=cfg.get("entropy_temperature", 0.01),
    )
    q.embedding.weight.data = ref[f"{case}/codebook"].clone()
    z = flat(ref[f"{case}/z"]).requires_grad_()
    return ref, cfg, q, z, q(z)


@pytest.mark.parametrize("case", ["n64_entropy", "n128_plain", "n64_weights"])
def test_ibq_ids_losses_and_gradients_match(golden, case):
    ref, cfg, q, z, out = run(golden, case)
    losses = out.losses
    terms = {
        "quant_loss": losses["index"] + losses["commitment"] + cfg["beta"] * losses["codebook"],
        "cot_zq": (out.codes * flat(ref[f"{case}/cot"])).sum(),
    }
    if cfg["use_entropy_loss"]:
        terms["sample_entropy"], terms["avg_entropy"] = losses["entropy_sample"], losses["entropy_batch"]
        w_s, w_b = cfg.get("sample_minimization_weight", 1), cfg.get("batch_maximization_weight", 1)
        terms["entropy_loss"] = w_s * losses["entropy_sample"] - w_b * losses["entropy_batch"]
    assert torch.equal(out.ids.flatten(), ref[f"{case}/indices"])
    torch.testing.assert_close(out.codes, flat(ref[f"{case}/zq"]), rtol=1e-5, atol=2e-6)
    for name, value in terms.items():
        torch.testing.assert_close(value, ref[f"{case}/{name}"].reshape(()), rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad(value, [z, q.embedding.weight], retain_graph=True)
        expected = flat(ref[f"{case}/grad_z_{name}"]), ref[f"{case}/grad_codebook_{name}"]
        for grad, want in zip(grads, expected):
            assert (grad - want).abs().max() <= 1e-3 * want.abs().max() + 1e-6


def test_simvq_matches(golden):
    ref = golden("fsq_rvq_simvq_msvq")
    q = vistok.create("quantizer", "simvq", codebook_size=32, dim=6)
    q.frozen.copy_(ref["simvq/frozen_codebook"])
    q.projection.weight.data = ref["simvq/weight"].clone()
    z = ref["simvq/z"].requires_grad_()
    out = q(z)
    assert torch.equal(out.ids, ref["simvq/indices"])
    torch.testing.assert_close(out.codes, ref["simvq/zq"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, ref["simvq/loss"].reshape(()), rtol=1e-5, atol=0)
    grads = torch.autograd.grad(out.loss, [z, q.projection.weight])
    torch.testing.assert_close(grads[0], ref["simvq/grad_loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[1], ref["simvq/grad_weight_loss"], rtol=1e-4, atol=1e-6)
