"""TiTok stage 1: learn to predict the codes that a frozen proxy tokenizer gives to the same picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.data.base import Batch
from vistok.registry import register
from vistok.train.steps.base import LengthsPer, Losses, Part, Step, quantizer_stats, tokenizer_options


@register("step", "distil")
class Distil(Step):
    """Cross-entropy on proxy codes plus the quantizer's loss (TiTok stage 1; arXiv 2406.07550, section 3.2).

    The model is a `titok_two_stage`. Its pixel decoder and codebook are copied from the proxy and frozen, so that what
    stage 1 leaves decodes to pictures (through the softmax over codes; the official preview takes the arg max). The
    paper's loss has no pixel, perceptual or adversarial term.

    Args:
        proxy: The proxy tokenizer: a preset with weights, a folder or a file, as `vistok.load` takes it.
        lengths: A nested tokenizer decodes a random prefix of every `sample`, or prefixes of one length in a `step`.
    """

    own_losses: ClassVar[tuple[str, ...]] = ("proxy", "quantizer")

    def __init__(self, *, proxy: str, lengths: LengthsPer = "sample") -> None:
        self.proxy, self.lengths = proxy, lengths

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take the model and load the proxy.

        Raises:
            ValueError: The model predicts no proxy codes, the proxy is no MaskGIT-VQGAN of matching sizes, or the
                recipe asks for pixel losses, which stage 1 does not have.
        """
        import vistok
        from vistok.tokenizers.maskgit_vqgan import MaskGITVQGAN
        from vistok.tokenizers.titok import TwoStageTiTok

        super().setup(model, losses)
        if not isinstance(model, TwoStageTiTok):
            raise ValueError(f"Step 'distil' trains a titok_two_stage, got {type(model).__name__}. Set model.name.")
        if losses.losses:
            raise ValueError(
                f"Stage 1 has no pixel losses. Remove losses.{next(iter(losses.losses))}, or use 'reconstruct'."
            )
        proxy = vistok.load(self.proxy)
        if not isinstance(proxy, MaskGITVQGAN):
            raise ValueError(f"train.step.proxy: {self.proxy} is a {type(proxy).__name__}, not a MaskGIT-VQGAN.")
        model.take_pixel_decoder(proxy)
        for part in (model.pixel_codebook, model.pixel_decoder, proxy):
            part.requires_grad_(False)
        self.helpers["proxy"], self.bare = proxy, model

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """One part, `model`, with the share of codes guessed right as `proxy/accuracy`. See `Step.run`."""
        proxy, losses = self.helpers["proxy"], self.helpers["losses"]
        with torch.no_grad():
            target = proxy.tokenize(batch.images)[0].ids  # (B, h * w)
        options = tokenizer_options(self.bare, batch, step, self.lengths)
        out = self.trained["model"](batch.images, pixels=False, generator=generator, **options)
        logits: Tensor = out.extras["logits"].float()  # (B, h * w, V)
        terms = {"proxy": F.cross_entropy(logits.flatten(0, 1), target.flatten()), "quantizer": out.quantized.loss}
        weights = {name: losses.weight(name, step) for name in terms}  # type: ignore[operator]
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        accuracy = (logits.detach().argmax(-1) == target).float().mean()
        yield Part("model", total, terms, {**quantizer_stats(out.quantized), "proxy/accuracy": accuracy}, weights)
