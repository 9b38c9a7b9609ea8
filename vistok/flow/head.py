"""A flow on single vectors: the per-token head of continuous autoregressive models (MAR, MingTok)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vistok.flow.guidance import CFG, DualCFG, Guidance
from vistok.flow.samplers import EulerSampler, Sampler
from vistok.flow.time import TimeEmbedding
from vistok.layers.mlp import SwiGLU, gated_width
from vistok.layers.modulation import Modulation, modulate


class HeadBlock(nn.Module):
    """Residual SwiGLU, modulated in the order shift, scale, gate."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, gated_width(dim, ratio, 8))
        self.modulation = Modulation(dim, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, D) and the condition (B, D) -> (B, D)."""
        shift, scale, gate = self.modulation(condition).unbind(-2)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class FlowHead(nn.Module):
    """Velocity of one vector given a condition: Ming-UniVision's generation head (arXiv 2510.06590).

    Its velocity points from noise to data, the opposite of this package's; `velocity` turns it around.

    Args:
        channels: Channels of the vector, C.
        condition: Channels of the condition.
        width: Width, D.
        depth: Residual blocks.
        ratio: Hidden width of a plain MLP over D, before the two thirds of a gated one.

    Example:
        >>> import torch
        >>> head = FlowHead(channels=32, condition=48, width=64, depth=3)
        >>> head.sample(torch.randn(2, 48), steps=8).shape
        torch.Size([2, 32])
    """

    def __init__(
        self, *, channels: int, condition: int, width: int = 3072, depth: int = 12, ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.channels = channels
        self.time = TimeEmbedding(width, max_period=10000.0)
        self.condition = nn.Linear(condition, width)
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(HeadBlock(width, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(width, 2)
        self.head = nn.Linear(width, channels)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier-uniform linear layers, time 0.02, modulations and the last layer zero."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and "modulation" not in name:
                nn.init.normal_(layer.weight, std=0.02) if "time" in name else nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Data minus noise at (x_t (B, C), t (B,)) given the condition (B, Z); t = 1 is noise."""
        y = self.time(t) + self.condition(condition)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulation(y).unbind(-2)
        return self.head(modulate(self.norm(x), shift, scale))

    def velocity(self, conditions: Tensor) -> Callable[..., Tensor | list[Tensor]]:
        """A field for the samplers from the conditions of all branches, (branches, B, Z) or (B, Z) for one.

        All branches are one batch.
        """
        every = conditions if conditions.ndim == 3 else conditions[None]

        def field(x: Tensor, t: float, branches: int = 0) -> Tensor | list[Tensor]:
            count = max(branches, 1)
            if count > len(every):
                raise ValueError(f"Guidance needs {count} conditions and the field has {len(every)}.")
            many = x.to(self.embed.weight.dtype).repeat(count, 1)
            time = torch.full((len(many),), t, device=x.device)
            found = -self(many, time, every[:count].flatten(0, 1))
            return found if not branches else list(found.unflatten(0, (count, -1)))

        return field

    @torch.no_grad()
    def sample(
        self,
        conditions: Tensor,
        *,
        steps: int = 16,
        guidance: Guidance | None = None,
        shift: float = 1.0,
        noise: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        sampler: type[Sampler] = EulerSampler,
    ) -> Tensor:
        """Draw vectors.

        Args:
            conditions: (B, Z); for guidance one row of branches each, (branches, B, Z): the full condition, none, and
                for `DualCFG` the picture without text.
            steps: Sampling steps.
            guidance: What to do with the branches; the published weights (CFG 3, or text 3 and image 1.1) if None.
            shift: Shift of the time grid.
            noise: Where to start, (B, C); drawn if None.
            temperature: Factor of the noise.
            generator: Source of the noise.
            sampler: Class of the sampler.

        Returns:
            (B, C) float32.

        Raises:
            ValueError: A number of branches that the guidance does not take.
        """
        branches = 1 if conditions.ndim == 2 else len(conditions)
        if guidance is None:
            guidance = {2: CFG(3.0), 3: DualCFG()}.get(branches)
        if branches not in (1, 2, 3) or (guidance is not None and guidance.branches != branches and branches > 1):
            raise ValueError(f"Conditions of {branches} branches do not fit {type(guidance).__name__}.")
        if noise is None:
            shape = (conditions.shape[-2], self.channels)
            noise = torch.randn(shape, generator=generator, device=conditions.device)
        given = guidance if branches > 1 else None
        return sampler(steps, shift=shift)(self.velocity(conditions), temperature * noise, given)
