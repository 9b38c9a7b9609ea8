"""Sampler and guidance as one configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vistok.flow.guidance import APG, CFG, Guidance
from vistok.flow.samplers import SAMPLERS, Sampler


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a sampler and its guidance, as configurations hold them; the defaults are FlexTok's pipeline.

    Attributes:
        sampler: One of `SAMPLERS`.
        steps: Sampling steps (the model card of FlexTok has 20, its generation code 25).
        shift: Shift of the time grid.
        guidance: Scale; 1 for none.
        kind: `apg` or `cfg`.
        eta: See `APG`, also below.
        norm_threshold: Longest guidance vector.
        momentum: Momentum of the guidance vector.

    Raises:
        ValueError: No step, a shift that is not positive, or a negative scale.
    """

    sampler: Literal["euler", "heun", "midpoint", "rk4", "ab2"] = "euler"
    steps: int = 25
    shift: float = 1.0
    guidance: float = 7.5
    kind: Literal["apg", "cfg"] = "apg"
    eta: float = 0.0
    norm_threshold: float = 2.5
    momentum: float = -0.5

    def __post_init__(self) -> None:
        self.build()  # their checks, now and not when a trained model first decodes
        self.guide()

    def guide(self, scale: float | Callable[[float], float] | Guidance | None = None) -> Guidance:
        """The guidance, with another scale if given; a guidance object is taken as it is."""
        if isinstance(scale, Guidance):
            return scale
        scale = self.guidance if scale is None else scale
        if self.kind == "cfg":
            return CFG(scale)
        return APG(scale, eta=self.eta, norm_threshold=self.norm_threshold, momentum=self.momentum)

    def build(self, steps: int | None = None) -> Sampler:
        """The sampler, with another number of steps if given."""
        return SAMPLERS[self.sampler](self.steps if steps is None else steps, shift=self.shift)
