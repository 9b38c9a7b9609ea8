"""The losses TiTok was trained with, against the official code on filled weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vistok
from tests.fill import fill, image
from vistok.losses.discriminators import TiTokDiscriminator

pytestmark = pytest.mark.parity
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Reconstruction and target of the golden file."""
    rng = np.random.default_rng(81)
    x = image(2, 64, 81)
    noise = torch.from_numpy(rng.standard_normal(x.shape))
    return (x.double() + 0.1 * noise).clamp(-0.2, 1.2).float(), x


@pytest.fixture(scope="module")
def discriminator() -> TiTokDiscriminator:
    model = vistok.create("loss", "titok_discriminator")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not key.endswith("kernel"):
                value.copy_(torch.from_numpy(fill(key, tuple(value.shape))))
    return model


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory) -> dict[str, torch.nn.Module]:
    """LPIPS and ConvNeXt with filled weights, read from files as the official projects write them."""
    from torchvision.models import convnext_small

    folder: Path = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in convnext_small().state_dict().items()}
    torch.save({k: torch.from_numpy(fill(k, s)) for k, s in shapes.items()}, folder / "convnext.pth")
    channels = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    places = ("1.0", "1.2", "2.5", "2.7", "3.10", "3.12", "3.14", "4.17", "4.19", "4.21", "5.24", "5.26", "5.28")
    shapes = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    for place, inner, outer in zip(places, channels, channels[1:]):
        shapes[f"net.slice{place}.weight"], shapes[f"net.slice{place}.bias"] = (outer, inner, 3, 3), (outer,)
    table = {k: torch.from_numpy(fill(k, s)) for k, s in shapes.items()}
    torch.save({k: v.abs() if k.startswith("lin") else v for k, v in table.items()}, folder / "vgg.pth")
    return {
        "lpips": vistok.create("loss", "lpips", net="vgg", weights=str(folder / "vgg.pth")),
        "convnext_logits": vistok.create("loss", "convnext_logits", weights=str(folder / "convnext.pth")),
        "mse": vistok.create("loss", "mse"),
    }


def test_discriminator_has_the_official_keys_and_shapes(golden, discriminator):
    found = [[k, list(v.shape)] for k, v in discriminator.state_dict().items()]
    assert sorted(found) == sorted(golden("titok_losses").meta["discriminator_state_dict"])


def test_discriminator_logits_match_the_reference(golden, discriminator, pair):
    ref = golden("titok_losses")
    with torch.no_grad():
        torch.testing.assert_close(discriminator(pair[0]), ref["disc_fake"], **TOLERANCE)
        torch.testing.assert_close(discriminator(pair[1]), ref["disc_real"], **TOLERANCE)


def test_hinge_and_lecam_match_the_reference_over_two_steps(golden):
    ref = golden("titok_losses")
    gan = vistok.create("loss", "hinge_gan", lecam=0.001)
    for call in range(2):
        terms = gan.discriminator(ref["disc_real"], ref["disc_fake"])
        torch.testing.assert_close(terms.adversarial, ref["hinge"], **TOLERANCE)
        torch.testing.assert_close(terms.loss, ref[f"stage2_disc_call{call}_loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(0.001 * terms.lecam, ref[f"stage2_disc_call{call}_lecam"], rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(gan.real_mean, ref[f"stage2_disc_call{call}_ema_real"][0], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(gan.fake_mean, ref[f"stage2_disc_call{call}_ema_fake"][0], rtol=1e-4, atol=1e-9)


def test_lpips_per_picture_matches_the_reference(golden, perceptual, pair):
    with torch.no_grad():
        torch.testing.assert_close(perceptual["lpips"](*pair), golden("titok_losses")["lpips_per_image"], **TOLERANCE)


def test_convnext_logits_match_the_reference(golden, perceptual, pair):
    with torch.no_grad():
        found = perceptual["convnext_logits"](*pair).mean()
    torch.testing.assert_close(found, golden("titok_losses")["perceptual_convnext"], **TOLERANCE)


@pytest.mark.parametrize(
    ("case", "weights", "adversarial"),
    [
        ("stage2_step10", {"mse": 1.0, "convnext_logits": 0.1}, 0.0),
        ("stage2_step30", {"mse": 1.0, "convnext_logits": 0.1}, 0.01),
        ("single_vae_step30", {"mse": 1.0, "lpips": 1.0, "convnext_logits": 0.1}, 0.1),
    ],
)
def test_weighted_sum_and_its_gradient_match_the_reference(
    golden, perceptual, discriminator, pair, case, weights, adversarial
):
    ref = golden("titok_losses")
    reconstruction = pair[0].clone().requires_grad_()
    total = sum(w * perceptual[name](reconstruction, pair[1]).mean() for name, w in weights.items())
    if adversarial:
        gan = vistok.create("loss", "hinge_gan")
        generator = gan.generator(discriminator(reconstruction)).mean()
        torch.testing.assert_close(generator, ref[f"{case}_gan_loss"], **TOLERANCE)
        total = total + adversarial * generator
    if f"{case}_kl_loss" in ref:
        total = total + ref[f"{case}_kl_loss"]
    torch.testing.assert_close(total, ref[f"{case}_total"], **TOLERANCE)
    (gradient,) = torch.autograd.grad(total, reconstruction)
    torch.testing.assert_close(gradient.norm(), ref[f"{case}_gradnorm_reconstruction"], **TOLERANCE)
