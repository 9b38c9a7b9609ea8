"""A method at work in a vision transformer, alone: tokens, the way back, costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistok.compress.reduction import Reduction
from vistok.compress.vision import VisionMethod
from vistok.plugins.families.encoder import Encoder, find_tower
from vistok.plugins.handle import Attached, Handle
from vistok.plugins.tower import TowerRuntime, runtime_for


@dataclass(frozen=True, kw_only=True)
class TowerTrace:
    """Tokens of the last forward of a tower, prefix included.

    Attributes:
        attention: Tokens that each block's attention saw.
        mlp: Tokens that each block's MLP saw.
        start: Tokens at the first block.
        prefix: Tokens among them that are no patches.
        flops: Of the blocks, two per multiply-add, per picture: linear layers by their weights, attention 4 n^2 d.
        flops_without: The same if nothing had been reduced.
    """

    attention: list[int]
    mlp: list[int]
    start: int
    prefix: int
    flops: int
    flops_without: int

    def __str__(self) -> str:
        share = self.flops / max(self.flops_without, 1)
        return (
            f"tokens after each block {self.mlp}, from {self.start} (prefix {self.prefix})\n"
            f"FLOPs of the blocks {self.flops:.3e} of {self.flops_without:.3e} ({share:.1%})"
        )


class TowerPlugin(Attached):
    """A method at work in a vision transformer. Use it as a context manager, or keep it and call `detach()`.

    Attributes:
        model: What it was attached to.
        tower: The vision transformer in it.
        encoder: What kind that is.
        method: The method.
        name: Registered name of the method.
    """

    def __init__(self, model: nn.Module, method: VisionMethod) -> None:
        self.model, self.method = model, method
        self.name: str = getattr(method, "registry_name", type(method).__name__)
        self.encoder, self.tower = find_tower(model)
        restore = needs_full_length(model, self.tower, self.encoder) if method.restore is None else method.restore
        if self.encoder.flat and not restore:
            raise ValueError(
                f"A {type(self.tower).__name__} joins neighbouring patches after its blocks, so they give full length "
                "always. Leave restore=False away."
            )
        self.runtime: TowerRuntime = runtime_for(self.tower, method, restore=restore, side=1)
        self.handle = Handle()

    def install(self, owner: str) -> None:
        """Change the instances, each change recorded; nothing is left behind if it fails."""
        try:
            self.runtime.install(self.handle)
            self.handle.attribute(self.model, owner, self)
        except BaseException:
            self.handle.remove()
            raise

    @property
    def reduction(self) -> Reduction | None:
        """From the tokens at the first block to those after the last, prefix included; None if nothing changed.

        Raises:
            RuntimeError: Nothing has run yet.
        """
        return self._last(self.runtime).reduction

    @property
    def sizes(self) -> Tensor | None:
        """Patches that every token stands for, (B, N); None if nothing changed."""
        return self._last(self.runtime).sizes

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block at full length, (B, M, D) -> (B, N, D): every patch gets its token back.

        Args:
            tokens: As the tower gives them, prefix included. Dropped patches come back as zeros.
        """
        reduction = self.reduction
        return tokens if reduction is None else reduction.unmerge(tokens)

    def labels(self) -> Tensor:
        """Token that every patch went to, without the prefix, (B, patches); -1 where it was dropped."""
        reduction, work = self.reduction, self.runtime.last
        assert work is not None
        if reduction is None:
            return torch.arange(work.start).unsqueeze(0)
        found = reduction.labels()[:, self.runtime.prefix :]
        return torch.where(found >= 0, found - self.runtime.prefix, found)

    def _last(self, runtime: TowerRuntime) -> TowerRuntime:
        if runtime.last is None:
            raise RuntimeError("Nothing has run yet: give the model a picture first.")
        if len(getattr(runtime, "groups", ())) > 1:
            raise RuntimeError("The last pictures had several sizes, each with a reduction: see plugin.runtime.groups.")
        return runtime

    @property
    def trace(self) -> TowerTrace:
        """Tokens and FLOPs of the last forward.

        Raises:
            RuntimeError: Nothing has run yet.
        """
        runtime = self._last(self.runtime)
        work = runtime.last
        assert work is not None
        start = runtime.prefix + work.start
        counts = [start if state.index is None else state.index.shape[1] for state in work.states]
        between = counts[1:] if not self.method.after else counts[:-1]
        costs = [BlockCost.of(self.encoder, block) for block in self.encoder.blocks(self.tower)]
        return TowerTrace(
            attention=counts[:-1],
            mlp=between,
            start=start,
            prefix=runtime.prefix,
            flops=sum(c.flops(n, m) for c, n, m in zip(costs, counts, between)),
            flops_without=sum(c.flops(start, start) for c in costs),
        )


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """Weights of a block, for FLOPs in closed form (two per multiply-add).

    Attributes:
        attention: Numbers in the weight matrices of attention.
        mlp: The same of the MLP.
        width: Width of the attention.
    """

    attention: int
    mlp: int
    width: int

    @classmethod
    def of(cls, encoder: Encoder, block: Any) -> BlockCost:
        """Count a block's weights."""

        def matrices(module: Any) -> list[Tensor]:
            return [] if module is None else [p for p in module.parameters() if p.ndim == 2]

        attention = matrices(encoder.attention(block))
        return cls(
            attention=sum(p.numel() for p in attention),
            mlp=sum(p.numel() for p in matrices(encoder.mlp(block))),
            width=attention[0].shape[-1],
        )

    def flops(self, tokens: int, fed: int) -> int:
        """FLOPs when attention sees `tokens` and the MLP `fed`."""
        return 2 * (tokens * self.attention + 2 * tokens**2 * self.width + fed * self.mlp)


def needs_full_length(model: nn.Module, tower: nn.Module, encoder: Encoder) -> bool:
    """Whether something between model and tower may look at patches in a way that knows nothing of sizes."""
    if encoder.flat:
        return True
    names = {base.__name__ for base in type(model).__mro__}
    return model is not tower and not names & set(encoder.wrappers)
