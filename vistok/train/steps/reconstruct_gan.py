"""Reconstruction against a discriminator: TiTok stage 2, single-stage training, and every VQGAN-like recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.data.base import Batch
from vistok.losses.adversarial import GanLoss, adaptive_weight, r1_penalty
from vistok.registry import register
from vistok.train.steps.base import LengthsPer, Losses, Part
from vistok.train.steps.reconstruct import Reconstruct


class Judge(nn.Module):
    """A discriminator that looks at originals and reconstructions in one call, each in a pass of its own.

    One call, so that a data-parallel wrapper sees one forward pass per backward pass; two passes inside, so that batch
    statistics of originals and reconstructions do not mix.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both."""
        return self.net(real), self.net(fake)


@register("step", "reconstruct_gan")
class ReconstructGan(Reconstruct):
    """As `reconstruct`, with an adversarial loss against a discriminator that is trained beside.

    `losses.adversarial` has the weight and the step at which both the adversarial loss and the discriminator's
    training start (`start`); before it the discriminator is not touched, as in the official TiTok code. The
    discriminator is judged on the reconstruction of the same forward pass.

    Args:
        discriminator: A registered discriminator, e.g. `{name: titok_discriminator}`.
        gan: A registered adversarial loss, e.g. `{name: hinge_gan, lecam: 0.001}`.
        adaptive: Multiply the weight by VQGAN's ratio of gradient norms at the last layer. Off in all TiTok recipes.
        r1_gamma: Weight of the R1 penalty on originals; 0 for none.
        r1_every: Steps between penalties; the weight is multiplied by it.
        quantizer_weights: Weights of the quantizer's loss terms, instead of its published defaults.
        lengths: As in `reconstruct`.
        caption_dropout: As in `reconstruct`.
    """

    parts: ClassVar[tuple[str, ...]] = ("model", "discriminator")
    own_losses: ClassVar[tuple[str, ...]] = ("quantizer", "adversarial")

    def __init__(
        self,
        *,
        discriminator: Annotated[Spec, Of("loss")],
        gan: Annotated[Spec, Of("loss")],
        adaptive: bool = False,
        r1_gamma: float = 0.0,
        r1_every: int = 16,
        quantizer_weights: dict[str, float] | None = None,
        lengths: LengthsPer = "sample",
        caption_dropout: float = 0.0,
    ) -> None:
        super().__init__(quantizer_weights=quantizer_weights, lengths=lengths, caption_dropout=caption_dropout)
        self.specs = {"discriminator": discriminator, "gan": gan}
        self.adaptive, self.r1_gamma, self.r1_every = adaptive, r1_gamma, r1_every

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take a tokenizer and the losses, and build the discriminator.

        Raises:
            ValueError: No `losses.adversarial`, or something that is no discriminator or no adversarial loss.
        """
        super().setup(model, losses)
        if "adversarial" not in losses.weightings:
            raise ValueError(
                "losses.adversarial: step 'reconstruct_gan' needs its weight, e.g. {weight: 0.1, start: 1000}."
            )
        gan, net = create("loss", **self.specs["gan"]), create("loss", **self.specs["discriminator"])
        if not isinstance(gan, GanLoss):
            raise ValueError(
                f"train.step.gan: {self.specs['gan']['name']!r} is no adversarial loss (their names end in _gan)."
            )
        if not any(p.requires_grad for p in net.parameters()):
            raise ValueError(f"train.step.discriminator: {self.specs['discriminator']['name']!r} is no discriminator.")
        if self.adaptive and not hasattr(model, "last_layer"):
            raise ValueError(f"train.step.adaptive: {type(model).__name__} does not say which layer is its last.")
        self.net = net
        self.trained["discriminator"] = Judge(net)
        self.helpers["gan"] = gan

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """Parts `model` and, from its start on, `discriminator`. See `Step.run`."""
        losses: Losses = self.helpers["losses"]  # type: ignore[assignment]
        weight = losses.weight("adversarial", step)
        started = step >= losses.weightings["adversarial"].start
        for part in super().run(batch, step, generator):
            yield self._against(part, weight) if started else part
        if started:
            yield self._discriminate(batch.images, step)

    def _against(self, part: Part, weight: float) -> Part:
        """The model's part with the adversarial term added."""
        self.net.requires_grad_(False)  # the generator's turn leaves no gradient in the discriminator
        adversarial = self._gan.generator(self.net(self.rebuilt)).mean()
        self.net.requires_grad_(True)
        stats = dict(part.stats)
        if self.adaptive:
            ratio = adaptive_weight(part.loss, adversarial, self.bare.last_layer)  # type: ignore[arg-type]
            stats["adaptive_weight"] = ratio
            adversarial = adversarial * ratio
        terms, weights = {**part.terms, "adversarial": adversarial}, {**part.weights, "adversarial": weight}
        return Part("model", part.loss + weight * adversarial, terms, stats, weights)

    def _discriminate(self, real: Tensor, step: int) -> Part:
        fake = self.rebuilt.detach()
        found = self._gan.discriminator(*self.trained["discriminator"](real, fake))
        terms = {"discriminator": found.adversarial, "lecam": found.lecam}
        loss = found.loss
        if self.r1_gamma and step % self.r1_every == 0:
            terms["r1"] = r1_penalty(self.net, real).mean()
            loss = loss + 0.5 * self.r1_gamma * self.r1_every * terms["r1"]
        return Part("discriminator", loss, terms, {"discriminator/accuracy": found.accuracy})

    @property
    def _gan(self) -> GanLoss:
        gan = self.helpers["gan"]
        assert isinstance(gan, GanLoss)
        return gan

    def state(self) -> dict[str, Tensor]:
        """LeCAM's running means."""
        return {f"gan.{name}": value for name, value in self._gan.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self._gan.load_state_dict({name.removeprefix("gan."): value for name, value in state.items()})
