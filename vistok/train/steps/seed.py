"""SEED stage II: codebook and de-tokenizer learn on frozen causal embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from vistok.config import Of, Spec, create
from vistok.data.base import Batch
from vistok.registry import register
from vistok.train.steps.base import Losses, Part, Step, quantizer_stats


@register("step", "seed")
class SeedStep(Step):
    """Losses of SEED stage II (arXiv 2307.08041, section 3.2; released training code).

    `embedding` = mean squared error of the image embedding against a frozen teacher's, `rebuilt` = 1 - cosine of the
    causal embeddings rebuilt from the codes, `quantizer` = the quantizer's loss. The official VQ keeps the old form in
    which 0.25 weighs the codebook term and 1 the commitment: `quantizer_weights: {codebook: 0.25, commitment: 1.0}`.
    What is frozen is the recipe's `train.freeze`: published is everything up to the causal embeddings.

    Logged besides: cosine with the teacher's embedding, and the share of pictures whose own target is the nearest of
    the batch.

    Args:
        teacher: A loss that embeds pictures: `clip_embedding` or `alexnet_embedding`.
        quantizer_weights: Weights of the quantizer's loss terms, instead of its published defaults.
    """

    own_losses: ClassVar[tuple[str, ...]] = ("embedding", "rebuilt", "quantizer")

    def __init__(
        self, *, teacher: Annotated[Spec, Of("loss")], quantizer_weights: dict[str, float] | None = None
    ) -> None:
        self.teacher = teacher
        self.quantizer_weights = quantizer_weights or {}

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take the model and build the teacher.

        Raises:
            ValueError: The model is no SEED, the teacher embeds no pictures or into another number of channels, pixel
                losses, or weights of terms that the quantizer does not have.
        """
        from vistok.losses.image_embedding import ImageEmbedding
        from vistok.tokenizers.seed import SEED

        super().setup(model, losses)
        if not isinstance(model, SEED):
            raise ValueError(f"Step 'seed' trains a seed tokenizer, got {type(model).__name__}. Set model.name.")
        if losses.losses:
            raise ValueError(f"SEED's tokens give no pixels to compare. Remove losses.{next(iter(losses.losses))}.")
        unknown = set(self.quantizer_weights) - set(model.quantizer.weights)
        if unknown:
            raise ValueError(
                f"train.step.quantizer_weights: {', '.join(sorted(unknown))}: the quantizer has "
                f"{', '.join(model.quantizer.weights)}."
            )
        model.quantizer.weights.update(self.quantizer_weights)
        teacher = create("loss", **self.teacher)
        if not isinstance(teacher, ImageEmbedding):
            raise ValueError(f"train.step.teacher: {self.teacher['name']!r} does not embed pictures.")
        if teacher.dim != model.config["embedding_dim"]:
            raise ValueError(
                f"The teacher's embedding has {teacher.dim} channels. Set model.embedding_dim={teacher.dim}."
            )
        self.helpers["teacher"] = teacher

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """One part, `model`. See `Step.run`."""
        teacher, losses = self.helpers["teacher"], self.helpers["losses"]
        out = self.trained["model"](batch.images, generator=generator)
        found, target = out.extras["embedding"].float(), teacher(batch.images)  # (B, E)
        rebuilt, causal = out.extras["rebuilt"].float(), out.extras["causal"].float()  # (B, N, D)
        terms = {
            "embedding": F.mse_loss(found, target),
            "rebuilt": (1 - F.cosine_similarity(rebuilt, causal.detach(), dim=-1)).mean(),
            "quantizer": out.quantized.loss,
        }
        weights = {name: losses.weight(name, step) for name in terms}  # type: ignore[operator]
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        similar = F.normalize(found.detach(), dim=1) @ F.normalize(target, dim=1).T  # (B, B)
        own = torch.arange(len(similar), device=similar.device)
        stats = {
            "embedding/cosine": similar.diagonal().mean(),
            "embedding/retrieved": (similar.argmax(1) == own).float().mean(),
        }
        yield Part("model", total, terms, {**quantizer_stats(out.quantized), **stats}, weights)
