"""The training side of rectified flow: times, noised data, target, loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vistok.flow.time import shift_time


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """Straight paths between noise (t = 1) and data (t = 0) (arXiv 2209.03003; times of SD3, arXiv 2403.03206).

    `logit_normal`: t = sigmoid(n), n ~ N(0, 1). `uniform`: t = u. `mode`: t = 1 - u - s (cos^2(pi u / 2) - 1 + u)
    with s = `mode_scale`; s = 0 is the uniform law mirrored. SD3 compares s = 1.29. The loss is not weighted by t: the
    law of t is the weighting.

    Attributes:
        t_sampler: Law of the training times.
        mode_scale: s of `mode`; the map is monotone for -1 <= s <= 2 / (pi - 2) = 1.752.
        shift: Move the times towards the noise, see `shift_time`; 1 leaves them.
        stratified: For `logit_normal`, one draw in each of B equal shares of probability, in batch order.
        prediction: What the network gives: the velocity noise - data, or the data themselves (arXiv 2511.13720), from
            which the velocity is (x_t - data) / t.
        least_t: With `data` predictions, t is not taken below this when dividing.
    """

    t_sampler: Literal["logit_normal", "uniform", "mode"] = "logit_normal"
    mode_scale: float = 0.0
    shift: float = 1.0
    stratified: bool = False
    prediction: Literal["velocity", "data"] = "velocity"
    least_t: float = 0.05

    def __post_init__(self) -> None:
        if self.t_sampler == "mode" and not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"mode_scale is -1 .. {2 / (math.pi - 2):.3f}, where the map is monotone: {self.mode_scale}."
            )
        if self.stratified and self.t_sampler != "logit_normal":
            raise ValueError(f"Stratified times are logit-normal; t_sampler is {self.t_sampler!r}.")
        if not self.shift > 0:
            raise ValueError(f"The time shift is positive, got {self.shift}.")
        if not 0 < self.least_t <= 1:
            raise ValueError(f"least_t lies in (0, 1], got {self.least_t}.")

    def sample_t(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        *,
        draws: Tensor | None = None,
        offset: int = 0,
        total: int | None = None,
    ) -> Tensor:
        """Training times, float32, (B,).

        Args:
            batch: Pictures, B.
            generator: Source of the draws.
            draws: Uniform numbers in [0, 1) to use instead, (B,), e.g. keyed by sample.
            offset: Place of this share in the joint batch, for stratified times on several processes.
            total: Size of the joint batch; B if None.
        """
        device = None if generator is None else generator.device
        u = (
            torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
            if draws is None
            else draws.double()
        )
        if self.stratified:
            u = (torch.arange(batch, device=u.device) + offset + u) / (total or batch)
        t = self._law(u)
        return t if self.shift == 1 else shift_time(t, self.shift)

    def _law(self, u: Tensor) -> Tensor:
        if self.t_sampler == "logit_normal":
            return self.from_normal(math.sqrt(2.0) * torch.erfinv(2 * u - 1))
        if self.t_sampler == "uniform":
            return u.float()
        return (1 - u - self.mode_scale * ((math.pi / 2 * u).cos().square() - 1 + u)).float()

    @staticmethod
    def from_normal(n: Tensor) -> Tensor:
        """Logit-normal times of standard normal numbers, float32."""
        return n.sigmoid().float()

    @staticmethod
    def add_noise(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """X_t = t noise + (1 - t) data; data and noise (B, ...), t (B,)."""
        t = _per_sample(t, data)
        return t * noise + (1 - t) * data

    @staticmethod
    def target(data: Tensor, noise: Tensor) -> Tensor:
        """The velocity noise - data."""
        return noise - data

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity behind a network's output at (x_t, t); (B, ...), t (B,)."""
        if self.prediction == "velocity":
            return output
        return (x_t - output) / _per_sample(t, x_t).clamp_min(self.least_t)

    def loss(self, velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the velocity per picture, float32, (B,); 1 + E[data^2] for a network that gives 0."""
        error = velocity.float() - self.target(data, noise).detach().float()
        return error.square().flatten(1).mean(1)

    @staticmethod
    def data_of(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """The data estimate x_t - t v."""
        return x_t - _per_sample(t, x_t) * velocity

    @staticmethod
    def noise_of(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """The noise estimate x_t + (1 - t) v."""
        return x_t + (1 - _per_sample(t, x_t)) * velocity


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
