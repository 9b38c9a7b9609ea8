"""Samplers: from noise at t = 1 to data at t = 0 along a velocity field.

A field is a callable `velocity(x, t)` with a Python number t. With guidance it is called as
`velocity(x, t, branches)` and gives a sequence of velocities, the conditional one first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vistok.flow.guidance import Guidance
from vistok.flow.time import shift_time

Field = Callable[[Tensor, float], Tensor]


class Sampler:
    """Base of all samplers: a grid of times, and a step from one to the next.

    A deterministic sampler refuses options with a TypeError.

    Args:
        steps: Steps of the grid; the network is evaluated `evaluations` times in all.
        shift: Shift of the uniform grid, see `shift_time`; 1 leaves it uniform.

    Raises:
        ValueError: No step, or a shift that is not positive.
    """

    def __init__(self, steps: int = 25, *, shift: float = 1.0) -> None:
        if steps < 1:
            raise ValueError(f"A sampler needs at least 1 step, got steps={steps}.")
        if not shift > 0:
            raise ValueError(f"The time shift is positive, got {shift}.")
        self.steps, self.shift = steps, shift

    @property
    def times(self) -> list[float]:
        """The grid, `steps` + 1 times from 1 to 0."""
        return [shift_time(i / self.steps, self.shift) for i in range(self.steps, -1, -1)]

    @property
    def evaluated(self) -> list[float]:
        """Times at which the network is evaluated, in order; what depends on time alone can be computed ahead."""
        seen: list[float] = []

        def watch(x: Tensor, t: float) -> Tensor:
            seen.append(t)
            return x

        self._run(watch, torch.zeros(()), {})
        return seen

    @property
    def evaluations(self) -> int:
        """Network evaluations per branch."""
        return len(self.evaluated)

    @torch.no_grad()
    def __call__(
        self, velocity: Callable[..., Any], noise: Tensor, guidance: Guidance | None = None, **options: Any
    ) -> Tensor:
        """Integrate from noise to data.

        The state is kept in float32 (float64 if the noise is), whatever the network computes in.

        Args:
            velocity: The field, see the module's docstring.
            noise: Where to start, (B, ...).
            guidance: How to combine conditions; None for the conditional velocity alone.
            **options: Of this sampler (source of noise of a stochastic one).

        Returns:
            Data, of the noise's shape.
        """
        state = noise if noise.dtype == torch.float64 else noise.float()
        if guidance is not None:
            guidance.reset()
        return self._run(_guided(velocity, guidance), state, options)

    def _run(self, field: Field, x: Tensor, options: dict[str, Any]) -> Tensor:
        self._refuse(options)
        times = self.times
        for start, end in itertools.pairwise(times):
            x = self.step(field, x, start, end)
        return x

    def step(self, field: Field, x: Tensor, start: float, end: float) -> Tensor:
        """X at `end` from x at `start` > `end`."""
        raise NotImplementedError

    def _refuse(self, options: dict[str, Any]) -> None:
        if options:
            raise TypeError(f"{type(self).__name__} is deterministic and takes no option {sorted(options)}.")


def _guided(velocity: Callable[..., Any], guidance: Guidance | None) -> Field:
    if guidance is None:
        return lambda x, t: velocity(x, t).to(x.dtype)

    def field(x: Tensor, t: float) -> Tensor:
        if not guidance.active(t):
            return velocity(x, t, 1)[0].to(x.dtype)
        found = [v.to(x.dtype) for v in velocity(x, t, guidance.branches)]
        return guidance(*found, x=x, t=t)

    return field


class EulerSampler(Sampler):
    """First order, one evaluation per step: x <- x + (t' - t) v. What FlexTok, MingTok and xAR's ODE use."""

    def step(self, field: Field, x: Tensor, start: float, end: float) -> Tensor:
        """See `Sampler.step`."""
        return x + (end - start) * field(x, start)


class HeunSampler(Sampler):
    """Second order, two evaluations per step: the mean of the velocities at both ends.

    The last step is Euler's (Karras et al., arXiv 2206.00364, algorithm 1): nothing is asked at t = 0, which training
    hardly shows and where the velocity of a network that predicts data is a division by 0. One such step does not
    change the order of the whole.
    """

    def step(self, field: Field, x: Tensor, start: float, end: float) -> Tensor:
        """See `Sampler.step`."""
        first = field(x, start)
        ahead = x + (end - start) * first
        return ahead if end == 0 else x + (end - start) * (first + field(ahead, end)) / 2


class MidpointSampler(Sampler):
    """Second order, two evaluations per step: the velocity in the middle."""

    def step(self, field: Field, x: Tensor, start: float, end: float) -> Tensor:
        """See `Sampler.step`."""
        half = (end - start) / 2
        return x + 2 * half * field(x + half * field(x, start), start + half)


class RungeKuttaSampler(Sampler):
    """The classical fourth order, four evaluations per step.

    The last step is of third order with three evaluations (Ralston's), for the reason that `HeunSampler` gives.
    """

    def step(self, field: Field, x: Tensor, start: float, end: float) -> Tensor:
        """See `Sampler.step`."""
        dt = end - start
        a = field(x, start)
        b = field(x + dt / 2 * a, start + dt / 2)
        if end == 0:
            return x + dt / 9 * (2 * a + 3 * b + 4 * field(x + 3 * dt / 4 * b, start + 3 * dt / 4))
        c = field(x + dt / 2 * b, start + dt / 2)
        d = field(x + dt * c, end)
        return x + dt / 6 * (a + 2 * b + 2 * c + d)


class AdamsBashforthSampler(Sampler):
    """Second order at one evaluation per step: extrapolates from the velocity of the step before.

    The integral of the line through the last two velocities, so exact where the velocity is linear in t, also on
    uneven grids. The first step is Euler's.
    """

    def _run(self, field: Field, x: Tensor, options: dict[str, Any]) -> Tensor:
        self._refuse(options)
        times = self.times
        before: tuple[float, Tensor] | None = None
        for start, end in itertools.pairwise(times):
            v = field(x, start)
            slope = 0.0 if before is None else (v - before[1]) / (start - before[0])
            x = x + (end - start) * (v + (end - start) / 2 * slope)
            before = start, v
        return x


class EulerMaruyamaSampler(Sampler):
    """The stochastic sampler of xAR and SiT (arXiv 2502.20388, 2401.08740): diffusion g(t) = 2 t, last step without.

    With the score s = -((1 - t) v + x) / t of the straight path, the drift v - g s / 2 is (2 - t) v + x;
    x <- x + drift dt + sqrt(2 t |dt|) noise. Guidance acts on the velocity, of which the drift is a linear function.

    Args:
        steps: Evaluations, from t = 1 to `last`, and from there to 0.
        last: Where the last step starts.
    """

    def __init__(self, steps: int = 50, *, last: float = 0.04) -> None:
        super().__init__(steps)
        if not 0 < last <= 1:
            raise ValueError(f"The last step starts in (0, 1], got last={last}.")
        self.last = last

    @property
    def times(self) -> list[float]:
        """`steps` times from 1 to `last`, then 0."""
        between = [1 + (self.last - 1) * i / max(self.steps - 1, 1) for i in range(self.steps)]
        return [*between, 0.0]

    def _run(self, field: Field, x: Tensor, options: dict[str, Any]) -> Tensor:
        """`options`: `noises`, one tensor like x per step but the last; or a `generator`."""
        noises, generator = options.pop("noises", None), options.pop("generator", None)
        if options:
            raise TypeError(f"EulerMaruyamaSampler takes the options noises and generator, got {sorted(options)}.")
        if noises is not None and len(noises) != self.steps - 1:
            raise ValueError(f"{self.steps} steps need {self.steps - 1} noises, got {len(noises)}.")
        times = self.times
        for i, (start, end) in enumerate(itertools.pairwise(times)):
            drift = (2 - start) * field(x, start) + x
            x = x + (end - start) * drift
            if i < self.steps - 1:
                noise = _like(x, generator) if noises is None else noises[i].to(x)
                x = x + (2 * start * (start - end)) ** 0.5 * noise
        return x


def _like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


SAMPLERS: dict[str, type[Sampler]] = {
    "euler": EulerSampler,
    "heun": HeunSampler,
    "midpoint": MidpointSampler,
    "rk4": RungeKuttaSampler,
    "ab2": AdamsBashforthSampler,
}
"""Deterministic samplers by the names that configurations use."""
