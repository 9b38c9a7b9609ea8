"""SEED stage I: the causal Q-Former learns to tell which caption belongs to which picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok import distributed
from vistok.data.base import Batch
from vistok.registry import register
from vistok.train.steps.base import Losses, Part, Step


@register("step", "seed_contrastive")
class SeedContrastive(Step):
    """The loss of SEED stage I (arXiv 2307.08041, section 3.1; released training code).

    `contrastive` = mean of the cross-entropies of picture to caption and caption to picture, over all pictures of one
    forward pass on all processes; a picture is the projected last causal embedding, a caption the projected first token
    of the text branch, both of length 1, their cosine is divided by a learned temperature. As in the released code,
    gradients reach a feature only where it asks, not where it is one of the answers; the gather has none. BLIP-2's
    matching and captioning losses are switched off there and do not exist here.

    The quantizer and everything behind it is not used and stands still. The rest of what is frozen is the recipe's
    `train.freeze`: published is the vision tower without its last norm. `train.batch` would take the negatives of a
    step apart, so leave it out.

    Logged besides: the temperature, and the share of pictures whose own caption is the nearest.

    Args:
        label_smoothing: Share of the target that is spread over all answers.
        blip_2: Files of LAVIS that the model starts from, see `official.seed.start_from_blip_2`; none for its own start
            or that of `train.init_from`.
    """

    own_losses: ClassVar[tuple[str, ...]] = ("contrastive",)

    def __init__(self, *, label_smoothing: float = 0.1, blip_2: tuple[str, ...] = ()) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"train.step.label_smoothing is at least 0 and below 1, got {label_smoothing}.")
        self.label_smoothing, self.blip_2 = label_smoothing, blip_2

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take the model and its first weights; freeze what stage II trains.

        Raises:
            ValueError: The model is no SEED or has no text branch, or the recipe has pixel losses.
            LoadError: Weights of BLIP-2 that do not fit.
        """
        from vistok.tokenizers.official.seed import start_from_blip_2
        from vistok.tokenizers.seed import SEED

        super().setup(model, losses)
        if not isinstance(model, SEED):
            raise ValueError(
                f"Step 'seed_contrastive' trains a seed tokenizer, got {type(model).__name__}. Set model.name."
            )
        if model.text_branch is None:
            raise ValueError("Step 'seed_contrastive' reads captions. Set model.text_branch, e.g. {kind: bert}.")
        if losses.losses:
            raise ValueError(f"SEED's tokens give no pixels to compare. Remove losses.{next(iter(losses.losses))}.")
        if self.blip_2:
            start_from_blip_2(model, self.blip_2)
        for name in model.second_stage:
            getattr(model, name).requires_grad_(False)

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """One part, `model`. See `Step.run`.

        Raises:
            ValueError: The data set gives no captions.
        """
        if batch.text is None:
            raise ValueError(
                "Step 'seed_contrastive' needs a caption for every picture and the data set gives none. Name one with "
                "captions, e.g. data: {name: photos, captions: true}."
            )
        losses: Losses = self.helpers["losses"]  # type: ignore[assignment]
        found = self.trained["model"](batch.images, captions=batch.text, generator=generator).extras
        loss, retrieved = contrast(found["picture"], found["text"], found["temperature"], self.label_smoothing)
        weight = losses.weight("contrastive", step)
        stats = {"contrastive/retrieved": retrieved, "contrastive/temperature": found["temperature"].detach().squeeze()}
        yield Part("model", weight * loss, {"contrastive": loss}, stats, {"contrastive": weight})


def contrast(picture: Tensor, text: Tensor, temperature: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Contrastive loss of this process's pairs among those of all processes.

    Args:
        picture: Features of length 1, (B, C).
        text: Features of their captions, (B, C); as many on every process.
        temperature: Divisor of the similarities.
        smoothing: Label smoothing.

    Returns:
        The loss, and the share of pictures whose own caption is the nearest, without gradient.
    """
    pictures, texts = (distributed.all_stack(x).flatten(0, 1) for x in (picture, text))  # (P B, C)
    own = distributed.rank() * len(picture) + torch.arange(len(picture), device=picture.device)
    to_text, to_picture = picture @ texts.T / temperature, text @ pictures.T / temperature  # (B, P B)
    asked = [F.cross_entropy(logits, own, label_smoothing=smoothing) for logits in (to_text, to_picture)]
    return torch.stack(asked).mean(), (to_text.detach().argmax(1) == own).float().mean()
