"""Adversarial losses on logits, LeCAM and R1 regularisers, the adaptive weight of VQGAN.

A step holds a discriminator (`vistok.losses.discriminators`) and one of the losses registered here:

    gan = vistok.create("loss", "hinge_gan", lecam=0.001)
    per_picture = gan.generator(discriminator(reconstruction))               # generator's turn
    terms = gan.discriminator(discriminator(target), discriminator(reconstruction.detach()))   # discriminator's turn

They see logits only, so the discriminator may be wrapped for several processes, compiled, or shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vistok.distributed import mean_with_local_gradient
from vistok.registry import register


@dataclass(frozen=True)
class DiscriminatorTerms:
    """What one discriminator step needs and logs.

    Attributes:
        loss: Scalar to minimise: the adversarial loss plus the weighted LeCAM term.
        adversarial: Scalar, unweighted.
        lecam: Scalar, unweighted; 0 when it is off.
        accuracy: Share of logits on the right side of 0, real and fake counted alike.
    """

    loss: Tensor
    adversarial: Tensor
    lecam: Tensor
    accuracy: Tensor


class GanLoss(nn.Module):
    """Base of the adversarial losses; a subclass implements `generator` and `separate`.

    LeCAM (Tseng et al., arXiv 2104.03310, eq. 4 and 5) keeps running means of the real and the fake logits and punishes
    real logits above the fake mean and fake logits below the real one. As in the official TiTok code it acts on batch
    means (the paper's is a mean of per-sample terms) and its running means start at 0. There each process has its own;
    here they are global, so two processes of b equal one of 2b. The running means are saved with the step.

    Args:
        lecam: Weight of LeCAM, 0 switches it off.
        lecam_decay: Decay of its running means.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, *, lecam: float = 0.0, lecam_decay: float = 0.999) -> None:
        super().__init__()
        self.lecam = lecam
        self.lecam_decay = lecam_decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def generator(self, fake: Tensor) -> Tensor:
        """The generator's loss from logits of its pictures, (B, ...) -> (B,), float32."""
        raise NotImplementedError

    def separate(self, real: Tensor, fake: Tensor) -> Tensor:
        """The discriminator's loss, a scalar, from float32 logits."""
        raise NotImplementedError

    def discriminator(self, real: Tensor, fake: Tensor) -> DiscriminatorTerms:
        """The discriminator's loss, and one update of LeCAM's running means.

        Args:
            real: Logits of originals, (B, ...).
            fake: Logits of reconstructions that carry no gradient to the generator, (B, ...).
        """
        real, fake = real.float(), fake.float()
        adversarial = self.separate(real, fake)
        lecam = self._lecam(real, fake) if self.lecam else adversarial.new_zeros(())
        accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return DiscriminatorTerms(adversarial + self.lecam * lecam, adversarial, lecam, accuracy.detach())

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        real_now, fake_now = mean_with_local_gradient(real.mean()), mean_with_local_gradient(fake.mean())
        term = F.relu(real_now - self.fake_mean).square() + F.relu(self.real_mean - fake_now).square()
        with torch.no_grad():  # used first, updated after; new tensors, since autograd has kept the old ones
            self.real_mean = torch.lerp(real_now.detach(), self.real_mean, self.lecam_decay)
            self.fake_mean = torch.lerp(fake_now.detach(), self.fake_mean, self.lecam_decay)
        return term


@register("loss", "hinge_gan")
class HingeGan(GanLoss):
    """Hinge loss (Lim and Ye, arXiv 1705.02894), half of it as VQGAN and TiTok have it; the generator gets -D.

    Args:
        lecam: Weight of the LeCAM term, 0 switches it off.
        lecam_decay: Decay of its running means.
    """

    def generator(self, fake: Tensor) -> Tensor:
        """Mean of -D per picture: (B, ...) -> (B,)."""
        return -fake.float().flatten(1).mean(1)

    def separate(self, real: Tensor, fake: Tensor) -> Tensor:
        """Half the mean of relu(1 - D(real)) plus relu(1 + D(fake)), a scalar."""
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


@register("loss", "non_saturating_gan")
class NonSaturatingGan(GanLoss):
    """Non-saturating logistic loss (Goodfellow et al., arXiv 1406.2661, section 3), half of it for the discriminator.

    Args:
        lecam: Weight of the LeCAM term, 0 switches it off.
        lecam_decay: Decay of its running means.
    """

    def generator(self, fake: Tensor) -> Tensor:
        """Mean of softplus(-D) per picture: (B, ...) -> (B,)."""
        return F.softplus(-fake.float()).flatten(1).mean(1)

    def separate(self, real: Tensor, fake: Tensor) -> Tensor:
        """Half the mean of softplus(-D(real)) plus softplus(D(fake)), a scalar."""
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


@register("loss", "magvit_gan")
class MagvitGan(HingeGan):
    """Open-MAGVIT2's and WeTok's pairing: hinge for the discriminator, softplus of a picture's mean logit for the rest.

    From the released code (arXiv 2409.04410, 2508.05599). Its LeCAM differs from TiTok's: the running means are updated
    before they are used, and the squares are those of single logits, not of their batch mean.

    Args:
        lecam: Weight of the LeCAM term, 0.05 in WeTok's configurations; 0 switches it off.
        lecam_decay: Decay of its running means.
    """

    def generator(self, fake: Tensor) -> Tensor:
        """softplus(-D), D the mean logit of a picture: (B, ...) -> (B,)."""
        return F.softplus(-fake.float().flatten(1).mean(1))

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        with torch.no_grad():
            real_now, fake_now = mean_with_local_gradient(real.mean()), mean_with_local_gradient(fake.mean())
            self.real_mean = torch.lerp(real_now, self.real_mean, self.lecam_decay)
            self.fake_mean = torch.lerp(fake_now, self.fake_mean, self.lecam_decay)
        return F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """R1 (Mescheder et al., arXiv 1801.04406, eq. 9): squared gradient of the logits at originals, per picture.

    The logits of a picture are summed before the gradient is taken (StyleGAN2's way, which has one logit). The step
    multiplies by gamma / 2, and by the interval if it does this only every so many steps.

    Args:
        discriminator: From pictures to logits.
        images: Originals, (B, 3, H, W).

    Returns:
        (B,), differentiable in the discriminator's weights.
    """
    images = images.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no second derivative
        logits = discriminator(images).float()
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, largest: float = 1e4, epsilon: float = 1e-4
) -> Tensor:
    """VQGAN's weight of the adversarial term (arXiv 2012.09841, eq. 7): the ratio of gradient norms at the last layer.

    The gradients are averaged over processes before their norms are taken, so that all use one weight (the official
    code lets every process have its own). The paper's delta is 1e-6, the official code's 1e-4, which we follow.

    Args:
        reconstruction: Scalar reconstruction loss, perceptual terms included.
        adversarial: Scalar generator loss.
        last_layer: Weight of the decoder's last layer.
        largest: Upper bound of the weight.
        epsilon: Added to the adversarial gradient's norm.

    Returns:
        A scalar without gradient.
    """
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    norms = [mean_with_local_gradient(g.detach()).norm() for g in gradients]
    return (norms[0] / (norms[1] + epsilon)).clamp(0.0, largest)
