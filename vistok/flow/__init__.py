"""Rectified flow: training objective, samplers and guidance for any network that predicts a velocity.

Convention of the whole folder: t = 0 is data, t = 1 is noise, x_t = t noise + (1 - t) data, and the velocity is
v = dx/dt = noise - data. A network trained with the opposite sign or direction is wrapped, not the samplers.
"""

from __future__ import annotations

from vistok.flow.guidance import APG, CFG, DualCFG, Guidance
from vistok.flow.head import FlowHead
from vistok.flow.rectified import RectifiedFlow
from vistok.flow.samplers import (
    SAMPLERS,
    AdamsBashforthSampler,
    EulerMaruyamaSampler,
    EulerSampler,
    HeunSampler,
    MidpointSampler,
    RungeKuttaSampler,
    Sampler,
)
from vistok.flow.sampling import Sampling
from vistok.flow.time import TimeEmbedding, shift_time, time_features

__all__ = [
    "APG",
    "CFG",
    "SAMPLERS",
    "AdamsBashforthSampler",
    "DualCFG",
    "EulerMaruyamaSampler",
    "EulerSampler",
    "FlowHead",
    "Guidance",
    "HeunSampler",
    "MidpointSampler",
    "RectifiedFlow",
    "RungeKuttaSampler",
    "Sampler",
    "Sampling",
    "TimeEmbedding",
    "shift_time",
    "time_features",
]
