"""VQ, clustering VQ and their entropies against stored outputs of the official implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vistok
from tests.fill import fill

pytestmark = pytest.mark.parity


def flat(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


def standard_normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy((scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32))


def close_scalar(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected.reshape(()), rtol=rtol, atol=1e-6)


TITOK = {"titok_vq_loss": ("vq", 31, 0.7, 12), "titok_vq_cvq": ("cvq", 4670, 0.5, 16)}


def run_titok(golden, name):
    """Yield (golden, step, quantizer before the step, z, result) for each stored step."""
    ref = golden(name)
    kind, seed, scale, channels = TITOK[name]
    cfg = ref.meta["config"]
    q = vistok.create("quantizer", kind, codebook_size=cfg["codebook_size"], dim=channels, l2_norm=cfg["use_l2_norm"])
    q.embedding.weight.data = torch.from_numpy(fill("embedding.weight", tuple(q.embedding.weight.shape)))
    q.train()
    for step in range(ref.meta["steps"]):
        z = flat(standard_normal(seed + step, (2, channels, 1, 32), scale)).requires_grad_()
        yield ref, step, q, z, q(z)


@pytest.mark.parametrize("name", TITOK)
def test_titok_ids_and_losses_match(golden, name):
    for ref, s, _, _, out in run_titok(golden, name):
        assert torch.equal(out.ids, ref[f"s{s}_ids"].squeeze(1))
        close_scalar(0.25 * out.losses["commitment"], ref[f"s{s}_commitment_loss"])
        close_scalar(out.losses["codebook"], ref[f"s{s}_codebook_loss"])
        close_scalar(out.loss, ref[f"s{s}_quantizer_loss"])
        torch.testing.assert_close(out.codes, flat(ref[f"s{s}_zq"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TITOK)
def test_titok_gradients_match(golden, name):
    for ref, s, q, z, out in run_titok(golden, name):
        dz, de = torch.autograd.grad(out.loss, [z, q.embedding.weight], retain_graph=True)
        torch.testing.assert_close(dz, flat(ref[f"s{s}_grad_z_of_quantizer_loss"]), rtol=1e-4, atol=1e-6)
        close_scalar(de.norm(), ref[f"s{s}_gradnorm_embedding"])
        assert int((de.abs().sum(1) > 0).sum()) == int(ref[f"s{s}_n_embedding_rows_with_grad"])
        probe = flat(standard_normal(TITOK[name][1] + 1000 + s, (2, z.shape[2], 1, 32)))
        (through,) = torch.autograd.grad((out.codes * probe).sum(), z)
        torch.testing.assert_close(through, flat(ref[f"s{s}_grad_z_straight_through"]), rtol=1e-4, atol=1e-5)


def test_clustering_moves_unused_codes_as_the_official_code_does(golden):
    for ref, s, q, _, _ in run_titok(golden, "titok_vq_cvq"):
        torch.testing.assert_close(q.embed_prob, ref[f"s{s}_embed_prob"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(
            q.embedding.weight[::8].detach(), ref[f"s{s}_embedding_after_rows"], rtol=0, atol=1e-5
        )
        w = q.embedding.weight.detach().double()
        stat = torch.stack([w.mean(), w.std(), w.min(), w.max()])
        torch.testing.assert_close(stat, ref[f"s{s}_embedding_after_stat"].double(), rtol=1e-3, atol=1e-4)


GIGATOK = ["l2_rot", "l2_ste_ent", "l2_rot_ent", "nol2_ste_ent"]


def run_gigatok(golden, case):
    ref = golden("vq_l2_rotation")
    cfg = ref.meta["cases"][case]["config"]
    q = vistok.create(
        "quantizer",
        "vq",
        codebook_size=cfg["n_e"],
        dim=cfg["e_dim"],
        l2_norm=cfg["l2_norm"],
        gradient="rotation" if cfg["rot"] else "straight_through",
        entropy_weight=cfg["entropy_loss_ratio"],
    )
    q.embedding.weight.data = ref[f"{case}/codebook"].clone()
    z = flat(ref[f"{case}/z"]).requires_grad_()
    return ref, cfg, q, z, q(z)


def gigatok_terms(cfg, out):
    terms = {"vq_loss": out.losses["codebook"], "commit_loss": 0.25 * out.losses["commitment"]}
    if cfg["entropy_loss_ratio"]:
        gap = out.losses["entropy_sample"] - out.losses["entropy_batch"]
        terms["entropy_loss"] = cfg["entropy_loss_ratio"] * gap
    return terms


@pytest.mark.parametrize("case", GIGATOK)
def test_gigatok_codes_ids_and_losses_match(golden, case):
    ref, cfg, _, _, out = run_gigatok(golden, case)
    assert torch.equal(out.ids.flatten(), ref[f"{case}/indices"])
    torch.testing.assert_close(out.codes, flat(ref[f"{case}/zq"]), rtol=1e-5, atol=2e-6)
    for name, term in gigatok_terms(cfg, out).items():
        close_scalar(term, ref[f"{case}/{name}"], rtol=1e-5)


@pytest.mark.parametrize("case", GIGATOK)
def test_gigatok_gradients_match(golden, case):
    ref, cfg, q, z, out = run_gigatok(golden, case)
    terms = {**gigatok_terms(cfg, out), "cot_zq": (out.codes * flat(ref[f"{case}/cot"])).sum()}
    for name, term in terms.items():
        dz, de = torch.autograd.grad(term, [z, q.embedding.weight], retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(dz, flat(ref[f"{case}/grad_z_{name}"]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(de, ref[f"{case}/grad_codebook_{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", GIGATOK)
def test_gigatok_decodes_ids_to_the_same_rows(golden, case):
    ref, _, q, z, _ = run_gigatok(golden, case)
    codes = q.eval().ids_to_codes(ref[f"{case}/indices"].reshape(z.shape[:2]))
    torch.testing.assert_close(codes, flat(ref[f"{case}/entry"]), rtol=1e-5, atol=1e-6)
