"""Training a compressor on a frozen host: it learns what the answers need of a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.data.base import Batch
from vistok.registry import register
from vistok.train.steps.base import Losses, Part
from vistok.train.steps.vlm import Vlm, accuracy, tail_of


@register("step", "compressor")
class TrainCompressor(Vlm):
    """Cross-entropy on the answers of a frozen host whose projector a trained compressor stands in for.

    The first stage of QueCC (arXiv 2411.03312) and TokenPacker (arXiv 2407.02392). The model is of kind `compressor`,
    sized for the host, and is all that a run keeps; the host is read and never written. Two losses, either of which
    may be left out of the recipe:

    - `answers`: next-token loss on the answers, as in step `vlm`.
    - `pooled` (ours, for a start in minutes): mean squared distance of the tokens from the means over the windows of
      what the host's own projector gives, relative to the mean square of those. With it alone the language model does
      not run at all.

    Args:
        host: Directory of the host with its processor.
        dtype: Of the host's weights.
        gradient_checkpointing: Compute activations of the host's language model again in the backward pass.
        turns: Most questions of a picture in one conversation; a compressor that reads a question reads the first.
    """

    model_kind: ClassVar[str] = "compressor"
    own_losses: ClassVar[tuple[str, ...]] = ("answers", "pooled")

    def __init__(
        self,
        *,
        host: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        turns: int | None = 1,
    ) -> None:
        super().__init__(turns=turns)
        self.path, self.dtype, self.gradient_checkpointing = host, dtype, gradient_checkpointing

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take a compressor, read the host, and put the one on the other.

        Raises:
            FileNotFoundError: No host there.
            TypeError: A host whose projector takes more than a patch at a time.
            ValueError: A compressor of other sizes, losses on pictures, or none at all.
        """
        from vistok.plugins.attach import attach
        from vistok.plugins.hosts.local import checkpoint_layers, read

        self.begin(model, losses)
        if not losses.weightings:
            raise ValueError(f"Step {self.registry_name!r} needs losses: {', '.join(self.own_losses)}, or one of them.")
        self.host, self.processor = read(self.path, self.dtype, "train.step.host")
        self.host.eval()
        self.plugin = attach(self.host, model.registry_name, compressor=model)  # type: ignore[arg-type]
        self.plugin.method.through(self._noted)
        self.helpers["host"] = self.host
        if self.gradient_checkpointing:
            checkpoint_layers(self.host)
            for layer in self.plugin.runtime.text.layers:
                layer.training = True  # what is inside stays in evaluation mode: no dropout

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """One part, `model`, with the share of answer tokens guessed right as `answers/accuracy`. See `Step.run`."""
        inputs, labels = self.inputs(batch)
        losses: Losses = self.helpers["losses"]  # type: ignore[assignment]
        weights = {name: losses.weight(name, step, 0.0) for name in self.own_losses}
        terms, stats = {}, {}
        short = self.plugin.prepare({**inputs, "labels": labels})
        if weights["answers"]:
            terms["answers"], stats["answers/accuracy"] = self._answered(short)
        if weights["pooled"]:
            terms["pooled"] = self._pooled()
        total = sum((weights[name] * term for name, term in terms.items()), start=torch.zeros(()).to(labels.device))
        yield Part("model", total, terms, stats, {name: weights[name] for name in terms})

    def _answered(self, short: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and share of answer tokens guessed right, of a prompt that is shortened already."""
        rest = {name: value for name, value in short.items() if name != "labels"}
        tail = tail_of(short["labels"])
        labels = short["labels"][:, -tail:]
        with self.plugin.pause():
            out = self.host(**rest, labels=labels, logits_to_keep=tail, use_cache=False)
        return out.loss, accuracy(out.logits, labels)

    def _noted(self, features: Tensor, levels: Tensor, *, grid: tuple[int, ...], text: Tensor | None) -> Tensor:
        """The compressor as the loop has wrapped it; what went in and came out is kept for `pooled`."""
        tokens: Tensor = self.trained["model"](features, levels, grid=grid, text=text)
        self._seen = (features, grid, tokens)
        return tokens

    def _pooled(self) -> Tensor:
        features, grid, tokens = self._seen
        with torch.no_grad():
            full = self.plugin.family.projector(self.host)(features).float()
            maps = full.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
            target = F.avg_pool2d(maps, self.plugin.method.module.window).flatten(2).transpose(1, 2)
        return (tokens.float() - target).square().mean() / target.square().mean()
