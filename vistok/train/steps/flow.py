"""Rectified flow on a tokenizer's latents: FlexTok, and what else decodes with a velocity."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.data.base import Batch
from vistok.registry import register
from vistok.train.steps.base import LengthsPer, Losses, Part, Step, quantizer_stats, tokenizer_options


@register("step", "flow")
class Flow(Step):
    """Velocity error of a flow decoder, plus the quantizer's loss and an alignment with a frozen DINOv2 (REPA).

    L = flow + repa + quantizer, each with its weight in the recipe's `losses`; the velocity's mean squared error is a
    mean over elements, then over pictures (arXiv 2502.13967; the official training code was not released). Times,
    noise, lengths and dropped conditions are keyed by (seed, step, sample).

    Args:
        t_sampler: Law of the training times, see `vistok.flow.RectifiedFlow`.
        mode_scale: Parameter of the law `mode`.
        shift: Shift of the times towards the noise.
        empty: Probability of training the empty condition.
        lengths: Random lengths per `sample`, or one for a `step`.
        repa: The alignment, e.g. `{name: repa, teacher: large}`; None for none. The model needs `repa_dim`.
    """

    own_losses: ClassVar[tuple[str, ...]] = ("flow", "repa", "quantizer")

    def __init__(
        self,
        *,
        t_sampler: Literal["logit_normal", "uniform", "mode"] = "logit_normal",
        mode_scale: float = 0.0,
        shift: float = 1.0,
        empty: float = 0.1,
        lengths: LengthsPer = "sample",
        repa: Annotated[Spec, Of("loss")] | None = None,
    ) -> None:
        if not 0 <= empty < 1:
            raise ValueError(f"train.step.empty is a probability below 1, got {empty}.")
        self.law = {"t_sampler": t_sampler, "mode_scale": mode_scale, "shift": shift}
        self.empty, self.lengths, self.repa = empty, lengths, repa

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take a tokenizer with a flow decoder, and build the alignment.

        Raises:
            ValueError: Another kind of tokenizer, pixel losses, or an alignment without a projector of its width.
        """
        super().setup(model, losses)
        flow: Any = getattr(model, "flow", None)
        if flow is None:
            raise ValueError(f"Step 'flow' trains a tokenizer with a flow decoder, got {type(model).__name__}.")
        if losses.losses:
            raise ValueError(f"A flow has no pixel losses. Remove losses.{next(iter(losses.losses))}.")
        self.flow = dataclasses.replace(flow, **self.law)
        self.bare = model
        dim = getattr(model, "repa_dim", None)
        if self.repa is not None:
            teacher = create("loss", **self.repa)
            if dim != teacher.width:
                raise ValueError(
                    f"The teacher has {teacher.width} channels and model.repa_dim is {dim}: make them equal."
                )
            self.helpers["repa"] = teacher
        elif dim is not None:
            raise ValueError("model.repa_dim builds a projector that nothing trains: set train.step.repa, or null.")

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """One part, `model`. See `Step.run`."""
        t = self.flow.sample_t(len(batch), draws=batch.uniform("flow_time")[:, 0])
        out = self.trained["model"](
            batch.images,
            t=t,
            null=batch.uniform("empty")[:, 0] < self.empty,
            noise=batch.normal("flow_noise", self.bare.latent_shape),  # type: ignore[arg-type]
            generator=generator,
            **tokenizer_options(self.bare, batch, step, self.lengths),
        )
        found, losses = out.extras, self.helpers["losses"]
        error = self.flow.loss(found["velocity"], found["latents"], found["noise"])  # (B,)
        terms: dict[str, Tensor] = {"flow": error.mean(), "quantizer": out.quantized.loss}
        if self.repa is not None:
            terms["repa"] = self.helpers["repa"](found["repa"], batch.images).mean()
        weights = {name: losses.weight(name, step) for name in terms}  # type: ignore[operator]
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        yield Part("model", total, terms, quantizer_stats(out.quantized), weights)
