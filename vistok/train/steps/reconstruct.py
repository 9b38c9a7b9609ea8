"""Reconstruction: a tokenizer learns to give back the picture it saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.data.base import Batch
from vistok.registry import nearest, register
from vistok.tokenizers.base import TokenizerOutput
from vistok.train.steps.base import LengthsPer, Losses, Part, Step, quantizer_stats, tokenizer_options


@register("step", "reconstruct")
class Reconstruct(Step):
    """Weighted sum of the recipe's losses on the reconstruction, plus the quantizer's own loss.

    Args:
        quantizer_weights: Weights of the quantizer's loss terms, instead of its published defaults.
        lengths: A nested tokenizer decodes a random prefix of every `sample`, or prefixes of one length in a `step`.
        caption_dropout: Share of samples that a tokenizer which reads captions sees without theirs.
    """

    own_losses: ClassVar[tuple[str, ...]] = ("quantizer",)
    rebuilt: Tensor
    """Reconstruction of the last forward pass, (B, 3, H, W), float32, for steps that build on this one."""

    def __init__(
        self,
        *,
        quantizer_weights: dict[str, float] | None = None,
        lengths: LengthsPer = "sample",
        caption_dropout: float = 0.0,
    ) -> None:
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"train.step.caption_dropout is a share of the samples, 0..1, got {caption_dropout}.")
        self.quantizer_weights, self.lengths = quantizer_weights or {}, lengths
        self.caption_dropout = caption_dropout

    def setup(self, model: torch.nn.Module, losses: Losses) -> None:
        """Take a tokenizer and the losses.

        Raises:
            ValueError: No loss at all, or weights of terms that a quantizer does not have.
        """
        super().setup(model, losses)
        if not losses.losses:
            raise ValueError("losses: a reconstruction needs at least one, e.g. losses.mse.weight=1.")
        weights: dict[str, float] = model.quantizer.weights  # type: ignore[union-attr,assignment]
        for name in self.quantizer_weights:
            if name not in weights:
                raise ValueError(f"train.step.quantizer_weights.{name}: no such term. {nearest(name, weights)}")
        weights.update(self.quantizer_weights)
        self.bare = model

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """One part, `model`. See `Step.run`."""
        options = tokenizer_options(self.bare, batch, step, self.lengths, self.caption_dropout)
        out = self.trained["model"](batch.images, generator=generator, **options, **self.model_options(step))
        self.rebuilt = out.images.float()
        losses: Losses = self.helpers["losses"]  # type: ignore[assignment]
        terms = {**losses(self.rebuilt, batch.images, step), **self.more_terms(out, batch, step)}
        weights = {name: losses.weight(name, step) for name in terms}
        stats: dict[str, Tensor] = {}
        if out.quantized is not None:
            terms["quantizer"], stats = out.quantized.loss, quantizer_stats(out.quantized)
            weights["quantizer"] = losses.weight("quantizer", step)
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        yield Part("model", total, terms, stats, weights)

    def model_options(self, step: int) -> dict[str, Any]:
        """What this objective asks of the model's `forward` at a step; nothing here."""
        return {}

    def more_terms(self, out: TokenizerOutput, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of this objective on something else than the reconstruction, named in `own_losses`; none here."""
        return {}
