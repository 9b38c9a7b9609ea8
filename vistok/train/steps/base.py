"""What a step object is, and losses with weights that depend on the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vistok.config import create
from vistok.data.base import Batch, keyed
from vistok.quantizers.base import Quantized


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """Weight of a loss over the run.

    Attributes:
        weight: Factor of the loss.
        start: First step it counts in; 0 before.
        ramp: Steps over which it grows linearly to `weight` after `start`.
    """

    weight: float = 1.0
    start: int = 0
    ramp: int = 0

    def at(self, step: int) -> float:
        """The factor at a step; a pure function."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / (self.ramp + 1))


@dataclass(frozen=True)
class LossSpec:
    """One entry of a recipe's `losses`.

    Attributes:
        weighting: Weight over the run.
        spec: Name and arguments of the registered loss; None for a loss that the step makes itself.
    """

    weighting: Weighting
    spec: Mapping[str, Any] | None


class Losses(nn.Module):
    """The recipe's registered losses, which compare a reconstruction with its target per picture."""

    def __init__(self, specs: Mapping[str, LossSpec]) -> None:
        super().__init__()
        self.weightings = {name: entry.weighting for name, entry in specs.items()}
        built = {name: create("loss", **entry.spec) for name, entry in specs.items() if entry.spec is not None}
        self.losses = nn.ModuleDict(built)

    def weight(self, name: str, step: int, default: float = 1.0) -> float:
        """Weight of an entry at a step; `default` where the recipe has no such entry."""
        return self.weightings[name].at(step) if name in self.weightings else default

    def forward(self, reconstruction: Tensor, target: Tensor, step: int) -> dict[str, Tensor]:
        """Unweighted means over the batch of every loss that counts at this step.

        Args:
            reconstruction: Pictures around [0, 1], (B, 3, H, W).
            target: Pictures in [0, 1], (B, 3, H, W).
            step: Step of the run.
        """
        active = {n: loss for n, loss in self.losses.items() if self.weight(n, step)}
        return {name: loss(reconstruction, target).mean() for name, loss in active.items()}


@dataclass(frozen=True)
class Part:
    """What one optimiser minimises in a step.

    Attributes:
        name: The part of the step it belongs to: which module and which optimiser.
        loss: What is differentiated, a scalar.
        terms: Unweighted scalar losses, for the log; those in `weights` also for gradient norms per loss.
        stats: Other scalars worth logging, under the names they get in the log (`quantizer/usage`).
        weights: Weight each term had in `loss`.
    """

    name: str
    loss: Tensor
    terms: Mapping[str, Tensor]
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


LengthsPer = Literal["sample", "step"]


def tokenizer_options(
    model: Any, batch: Batch, step: int, lengths: LengthsPer = "sample", caption_dropout: float = 0.0
) -> dict[str, Any]:
    """What a tokenizer's `forward` takes besides pictures: random lengths if it is nested, captions if it reads text.

    Args:
        model: The tokenizer, without wrappers.
        batch: This process's samples.
        step: Step of the run.
        lengths: A length for every sample, keyed by (seed, step, sample), or one for all samples of a step. Either way
            it depends neither on the process nor on accumulation.
        caption_dropout: Share of samples whose caption is replaced by the empty one, keyed like the lengths.
    """
    options: dict[str, Any] = {}
    if model.nested:
        if lengths == "sample":
            uniform = batch.uniform("lengths")[:, 0]
        else:
            uniform = torch.full((len(batch),), keyed(batch.seed, "lengths", step).random(), dtype=torch.float64)
        options["lengths"] = model.draw_lengths(uniform)
    if "text" in model.options:
        options["text"] = batch.text
        if batch.text is not None and caption_dropout:
            kept = (batch.uniform("caption_dropout")[:, 0] >= caption_dropout).tolist()
            options["text"] = tuple(text if keep else "" for text, keep in zip(batch.text, kept))
    return options


def quantizer_stats(quantized: Quantized) -> dict[str, Tensor]:
    """A quantizer's figures under the names they have in the log."""
    return {f"quantizer/{name}": value for name, value in quantized.stats.items()}


class Step:
    """A training objective. The loop knows only this.

    A subclass is registered under kind `step`; its constructor takes its settings (keyword-only, typed) and nothing
    heavy happens before `setup`.

    Attributes:
        parts: Names of what has an optimiser of its own, in order; the first is the deliverable.
        own_losses: Entries a recipe's `losses` may have besides registered losses; the step makes them itself.
        model_kind: Registry kind of the recipe's `model`.
        reads: What its batches hold: `pictures` (`Batch`) or `tokens` (`TokenBatch`, from data sets of tokens).
        unused_parameters: Whether some trained parameters may get no gradient in a step.
        trained: Part name to trained module. The loop replaces the modules by their prepared (wrapped) forms.
        helpers: Modules that are used but not trained; moved to the device.
        probe: Parameter of the deliverable that every loss reaches, for gradient norms per loss; None for none.
    """

    parts: ClassVar[tuple[str, ...]] = ("model",)
    own_losses: ClassVar[tuple[str, ...]] = ()
    model_kind: ClassVar[str] = "tokenizer"
    reads: ClassVar[Literal["pictures", "tokens"]] = "pictures"
    unused_parameters: ClassVar[bool] = False
    registry_name: ClassVar[str]
    trained: dict[str, nn.Module]
    helpers: nn.ModuleDict
    probe: nn.Parameter | None = None

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take the model and build the rest; a step with further parts builds their modules here."""
        self.trained = {self.parts[0]: model}
        self.helpers = nn.ModuleDict({"losses": losses})
        self.probe = getattr(model, "last_layer", None)

    def run(self, batch: Any, step: int, generator: torch.Generator) -> Iterator[Part]:
        """The parts of one forward pass, in order.

        The loop differentiates each part's loss, and steps its optimiser, before it asks for the next one.

        Args:
            batch: This process's samples, a `Batch` or what `reads` says.
            step: Step of the run.
            generator: Source of noise, keyed by (seed, step, process); what must not depend on the number of
                processes is drawn with `batch.uniform`.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Tensors a checkpoint has to hold besides modules and optimisers (e.g. running means of a regulariser)."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        if state:
            raise ValueError(f"Step {self.registry_name!r} keeps no state, the checkpoint holds {sorted(state)}.")
