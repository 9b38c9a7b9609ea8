"""Guidance: how the velocities of several conditions become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

Scale = float | Callable[[float], float]
"""A number, or a function of t (which is 1 at the start of sampling)."""


class Guidance:
    """Base of all guidance; holds the state of one sampling call per picture.

    Attributes:
        branches: Conditions the network is evaluated under, the full one first, the empty one second.
    """

    branches: ClassVar[int] = 2

    def reset(self) -> None:
        """Forget the state; samplers call it when they start."""

    def active(self, t: float) -> bool:
        """Whether anything but the conditional velocity counts at t; if not, only that one is computed."""
        raise NotImplementedError

    def __call__(self, *velocities: Tensor, x: Tensor, t: float) -> Tensor:
        """One velocity of `branches` ones, (B, ...) each, at (x, t)."""
        raise NotImplementedError


class CFG(Guidance):
    """Classifier-free guidance, v = v_u + w (v_c - v_u) (arXiv 2207.12598).

    Args:
        scale: w, a number or a function of t. Where it is 1 the empty branch is not computed.

    Raises:
        ValueError: A negative number.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = _checked(scale)

    def active(self, t: float) -> bool:
        """See `Guidance.active`."""
        return at(self.scale, t) != 1.0

    def __call__(self, *velocities: Tensor, x: Tensor, t: float) -> Tensor:
        """(conditional, unconditional) -> guided, (B, ...)."""
        given, empty = velocities
        return empty + at(self.scale, t) * (given - empty)


class APG(Guidance):
    """Adaptive projected guidance (arXiv 2410.02416), "norm guidance" in FlexTok, whose constants are the defaults.

    Per picture, over all its elements: d = v_c - v_u; with momentum, M <- d + beta M and d = M; d is shortened to a
    norm of at most r; its part along v_c is multiplied by eta; v = v_c + (w - 1) d. The projection is computed in
    float64. FlexTok applies this to the velocity, the paper to the data estimate; `space` says which. A sampler that
    evaluates several times per step updates the momentum at every evaluation.

    VideoFlexTok: scale 15 to 30, momentum 0, norm_threshold 0.6.

    Args:
        scale: w, a number or a function of t.
        eta: Share of the parallel part that is kept.
        norm_threshold: r; 0 for no limit.
        momentum: beta; None or 0 for none.
        space: What is guided.
        relative: Take r per square root of the number of elements, so that it does not depend on the latent's size.

    Raises:
        ValueError: A negative scale.
    """

    def __init__(
        self,
        scale: Scale,
        *,
        eta: float = 0.0,
        norm_threshold: float = 2.5,
        momentum: float | None = -0.5,
        space: Literal["velocity", "data"] = "velocity",
        relative: bool = False,
    ) -> None:
        self.scale, self.eta, self.norm_threshold = _checked(scale), eta, norm_threshold
        self.momentum, self.space, self.relative = momentum, space, relative
        self._running: Tensor | None = None

    def reset(self) -> None:
        """Forget the momentum."""
        self._running = None

    def active(self, t: float) -> bool:
        """A function of t always needs both branches, since the momentum goes on."""
        return callable(self.scale) or self.scale != 1.0

    def __call__(self, *velocities: Tensor, x: Tensor, t: float) -> Tensor:
        """(conditional, unconditional) -> guided, (B, ...)."""
        given, empty = velocities
        if self.space == "velocity" or t == 0:
            return self._guide(given, empty, t)
        return (x - self._guide(x - t * given, x - t * empty, t)) / t

    def _guide(self, given: Tensor, empty: Tensor, t: float) -> Tensor:
        d = given - empty
        if self.momentum:
            d = d if self._running is None else d + self.momentum * self._running
            self._running = d
        if self.norm_threshold > 0:
            limit = self.norm_threshold * (d[0].numel() ** 0.5 if self.relative else 1.0)
            d = d * (limit / _norm(d)).clamp_max(1.0)  # limit / 0 is inf, clamped to 1
        wide, along = d.double(), given.double()
        along = along / _norm(along).clamp_min(1e-12)
        parallel = (wide * along).flatten(1).sum(1).reshape(-1, *(1,) * (d.ndim - 1)) * along
        d = (wide - parallel + self.eta * parallel).to(d.dtype)
        return given + (at(self.scale, t) - 1) * d


class DualCFG(Guidance):
    """Guidance with two conditions, as in InstructPix2Pix (arXiv 2211.09800) and Ming-UniVision's generation.

    Branches: all conditions, none, picture without text. v = v_u + image (v_i - v_u) + text (v_c - v_i).

    Args:
        text: Weight of the text.
        image: Weight of the picture.
        renorm: `channel`: shorten the result to the norm of v_c over the last axis, never lengthen it.
    """

    branches = 3

    def __init__(self, text: float = 3.0, image: float = 1.1, *, renorm: Literal["channel"] | None = None) -> None:
        self.text, self.image, self.renorm = text, image, renorm

    def active(self, t: float) -> bool:
        """See `Guidance.active`."""
        return (self.text, self.image) != (1.0, 1.0)

    def __call__(self, *velocities: Tensor, x: Tensor, t: float) -> Tensor:
        """(text and picture, none, picture alone) -> guided, (B, ..., C)."""
        both, empty, image = velocities
        return renormed(empty + self.image * (image - empty) + self.text * (both - image), both, self.renorm)


def renormed(velocity: Tensor, given: Tensor, how: Literal["channel"] | None) -> Tensor:
    """A guided velocity (..., C) that is nowhere longer over channels than the conditional one; unchanged for None."""
    if how is None:
        return velocity
    ratio = given.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True)
    return velocity * (ratio + 1e-8).clamp(0, 1)


def at(scale: Scale, t: float) -> float:
    """The scale at time t."""
    return float(scale(t)) if callable(scale) else float(scale)


def _checked(scale: Scale) -> Scale:
    if not callable(scale) and not scale >= 0:
        raise ValueError(f"A guidance scale is at least 0, and 1 for no guidance; got {scale}.")
    return scale


def _norm(x: Tensor) -> Tensor:
    """Norm over all elements of a picture, (B, 1, ...)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *(1,) * (x.ndim - 1))
