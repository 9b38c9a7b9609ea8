"""GigaTok: reconstruction with semantic regularisation, a feature loss, and a direct path that helps at the start."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.data.base import Batch
from vistok.registry import register
from vistok.tokenizers.base import TokenizerOutput
from vistok.tokenizers.gigatok import GigaTokBase
from vistok.train.steps.base import Losses, Part
from vistok.train.steps.reconstruct_gan import ReconstructGan


@register("step", "gigatok")
class GigaTokStep(ReconstructGan):
    """As `reconstruct_gan`, with GigaTok's own terms (arXiv 2504.08736 and its code), each weighted in `losses`.

    `features`: squared error between the convolutional encoder's map, held fixed, and the map that the transformers
    give back. `semantic`: minus the cosine between the decoder's features and a frozen vision model's (published
    weight 0.5). `direct`: the recipe's picture losses on the encoder's map decoded straight, while `step` is below
    `direct_until`. The published code would add the adversarial term to the direct path too; in every published
    schedule that path ends before the discriminator starts, so it is not built.

    Args:
        discriminator: A registered discriminator, `{name: patchgan_discriminator}` or `{name: dino_discriminator}`.
        gan: A registered adversarial loss.
        teacher: The frozen vision model, `{name: repa, teacher: base, ...}`; null for none.
        direct_until: First step without the direct path; 0 for none at all.
        discriminator_weight: Factor of the discriminator's own loss (0.5 as published; it matters to clipping only).
        adaptive: As in `reconstruct_gan`; off as published.
        quantizer_weights: Weights of the quantizer's loss terms, instead of its published defaults.
    """

    own_losses: ClassVar[tuple[str, ...]] = ("quantizer", "adversarial", "features", "semantic", "direct")

    def __init__(
        self,
        *,
        discriminator: Annotated[Spec, Of("loss")],
        gan: Annotated[Spec, Of("loss")],
        teacher: Annotated[Spec, Of("loss")] | None = None,
        direct_until: int = 0,
        discriminator_weight: float = 0.5,
        adaptive: bool = False,
        quantizer_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(discriminator=discriminator, gan=gan, adaptive=adaptive, quantizer_weights=quantizer_weights)
        self.teacher, self.direct_until = teacher, direct_until
        self.discriminator_weight = discriminator_weight

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take a GigaTok and the losses; build discriminator and teacher.

        Raises:
            ValueError: Another tokenizer, or a teacher whose features the model does not predict.
        """
        super().setup(model, losses)
        if not isinstance(model, GigaTokBase):
            raise ValueError(f"Step 'gigatok' trains a gigatok or gigatok_2d, got {type(model).__name__}.")
        dim = None if model.semantic is None else model.semantic[-1].out_features
        if self.teacher is None:
            if dim is not None:
                raise ValueError("model.semantic_dim builds a head that nothing trains: set it to null, or a teacher.")
            return
        teacher: Any = create("loss", **self.teacher)
        if dim != teacher.width:
            raise ValueError(f"The teacher has {teacher.width} channels: set model.semantic_dim to that, now {dim}.")
        self.helpers["teacher"] = teacher

    def model_options(self, step: int) -> dict[str, Any]:
        """The direct path, while it counts."""
        return {"direct": step < self.direct_until}

    def more_terms(self, out: TokenizerOutput, batch: Batch, step: int) -> dict[str, Tensor]:
        """`features`, `semantic` with a teacher, and `direct` while it counts."""
        found = out.extras
        terms = {"features": F.mse_loss(found["rebuilt_features"].float(), found["features"].detach().float())}
        if self.teacher is not None:
            terms["semantic"] = self.helpers["teacher"](found["semantic"], batch.images).mean()
        if "direct" in found:
            losses: Losses = self.helpers["losses"]  # type: ignore[assignment]
            parts = losses(found["direct"].float(), batch.images, step)
            terms["direct"] = sum((losses.weight(name, step) * part for name, part in parts.items()), start=0.0)
        return terms

    def _discriminate(self, real: Tensor, step: int) -> Part:
        part = super()._discriminate(real, step)
        return dataclasses.replace(part, loss=self.discriminator_weight * part.loss)
