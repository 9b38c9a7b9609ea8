"""The runtime inside a vision tower: runs blocks on fewer tokens and keeps sizes, positions and the way back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vistok.compress.groups import spread_out, spread_tokens
from vistok.compress.reduction import Reduction, take
from vistok.compress.vision import BlockView, VisionMethod
from vistok.plugins.families.encoder import Encoder, Step, encoder_of
from vistok.plugins.handle import Handle


@dataclass(kw_only=True)
class State:
    """The tokens in front of a block.

    Attributes:
        sizes: What each stands for, float32, (B, N); None if nothing has changed so far.
        index: Place of each among the tower's tokens, (B, N), None likewise.
        step: What made it from the state before, None likewise.
        before: The state it was made from.
    """

    sizes: Tensor | None = None
    index: Tensor | None = None
    step: Reduction | None = None
    before: State | None = None
    composed: Reduction | None = None

    @property
    def ragged(self) -> bool:
        """Some tokens are fillers."""
        return self.step is not None and (self.step.ragged or (self.before is not None and self.before.ragged))

    @property
    def total(self) -> Reduction | None:
        """From the tower's tokens to these, worked out when asked for; None if nothing has changed."""
        if self.composed is None and self.step is not None:
            first = None if self.before is None else self.before.total
            self.composed = self.step if first is None else replace(first.compose(self.step), sizes=self.step.sizes)
        return self.composed

    def after(self, step: Reduction) -> State:
        """The state after one more reduction, whose sizes are in units of the tower's tokens."""
        index = step.index if self.index is None else self.index.gather(1, step.index)
        return State(sizes=step.sizes.float(), index=index, step=step, before=self)


@dataclass(kw_only=True)
class Pass:
    """One forward of a tower, or of the pictures of one size in it.

    Attributes:
        start: Tokens behind the prefix at the first block.
        place: Raster place of each, (start,).
        order: Place in the tower's sequence of every patch, prefix first, in the order we keep, (T,); None: as it is.
        grid: (h, w) of the tokens, None if unknown.
        states: In front of every block that has run, and after the last.
        memory: What the method keeps.
    """

    start: int
    place: Tensor
    order: Tensor | None = None
    grid: tuple[int, ...] | None = None
    states: list[State] = field(default_factory=lambda: [State()])
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What became of the tokens that pictures began with, numbered over all pictures, (tiles, n).

    Attributes:
        label: Output that each went to, -1 where it was dropped.
        anchor: It is its output's anchor.
        protect: Its output must not be dropped later.
    """

    label: Tensor
    anchor: Tensor
    protect: Tensor


def tiles_of(work: Pass, method: VisionMethod, prefix: int, batch: int) -> Tiles:
    """The outcome of a forward, for pictures of one size."""
    device = work.place.device
    state, must = work.states[-1], method.must_stay(work.memory)
    if state.total is None:
        label = torch.arange(work.start, device=device).expand(batch, -1)
        anchor, slots = torch.ones_like(label, dtype=torch.bool), work.start
    else:
        label, slots = state.total.labels()[:, prefix:] - prefix, state.total.index.shape[1] - prefix
        real = state.total.valid[:, prefix:]
        label = label.clamp_min(-1)
        anchor = torch.zeros(batch, work.start + 1, dtype=torch.bool, device=device)
        at = (state.total.index[:, prefix:] - prefix).masked_fill(~real, work.start)
        anchor = anchor.scatter(1, at, True)[:, : work.start]
    protect = torch.zeros_like(anchor)
    if must is not None:
        protect = take(must, label.clamp_min(0)) & (label >= 0)
    offset = torch.arange(batch, device=device).unsqueeze(1) * slots
    return Tiles(label=torch.where(label >= 0, label + offset, -1), anchor=anchor, protect=protect)


class TowerRuntime:
    """Runs one method in one tower.

    Args:
        encoder: What is where in it.
        tower: The tower.
        method: What to do.
        restore: Give every block's output at the full length.
        side: Side of the square of patches that the host joins to one token.
    """

    def __init__(
        self, encoder: Encoder, tower: nn.Module, method: VisionMethod, *, restore: bool = False, side: int = 1
    ) -> None:
        self.encoder, self.tower, self.method = encoder, tower, method
        self.restore, self.side = restore, side
        self.prefix = encoder.prefix(tower)
        self.depth = len(encoder.blocks(tower))
        self.enabled = True
        self.batch = 0
        self.last: Pass | None = None
        self.step: Step | None = None

    def install(self, handle: Handle) -> None:
        """Replace the blocks' forwards on their instances, and listen to queries and keys."""
        for i, block in enumerate(self.encoder.blocks(self.tower)):
            handle.attribute(block, "forward", BlockForward(self, i, block, block.forward))
            if self.encoder.qk is not None:
                attn = self.encoder.attention(block)
                for name, role in zip(self.encoder.qk, ("queries", "content")):
                    handle.after(getattr(attn, name), Listener(self, block, role))
        self.encoder.weigh_pooling(self.tower, self, handle)

    def tiles(self) -> Tiles:
        """What became of the tokens behind the prefix of every picture of the last forward."""
        assert self.last is not None
        return tiles_of(self.last, self.method, self.prefix, self.batch)

    @property
    def sizes(self) -> Tensor | None:
        """Sizes at the end of the last forward, (B, N); None if nothing changed."""
        return None if self.last is None else self.last.states[-1].sizes

    @property
    def reduction(self) -> Reduction | None:
        """From the tower's tokens to those after the last block, prefix included; None if nothing changed."""
        return None if self.last is None else self.last.states[-1].total

    @property
    def group(self) -> int:
        """Patches to a token."""
        return self.side**2

    def forward(self, i: int, block: Any, x: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor | None:
        """Run a block; None means that the block may run as it is."""
        if i == 0:
            self.last = self.begin(x) if self.enabled else None
        if self.last is None or self.idle(self.last, i):
            return None
        return self.run(self.last, i, block, x, args, given)

    def idle(self, work: Pass, i: int) -> bool:
        """Whether a block may run as it is: nothing has changed, and the method does not look."""
        idle = work.states[i].sizes is None and not self.hears(work, i)
        if idle and len(work.states) == i + 1:
            work.states.append(work.states[i])
        return idle

    def hears(self, work: Pass, i: int) -> bool:
        """Whether the method acts in a block or watches it."""
        asked = (i, self.depth, work.start)
        return self.method.active(*asked) or self.method.watches(*asked)

    def begin(self, x: Tensor) -> Pass:
        """Set up a forward for tokens (B, T, D)."""
        self.batch, patches = len(x), x.shape[1] - self.prefix
        grid = self.encoder.grid(self.tower, patches)
        if self.side == 1:
            return Pass(start=patches, place=torch.arange(patches, device=x.device), grid=grid)
        assert grid is not None and len(grid) == 2
        h, w = grid[0] // self.side, grid[1] // self.side
        cells = torch.arange(patches, device=x.device).view(h, self.side, w, self.side).transpose(1, 2).flatten()
        order = torch.cat([torch.arange(self.prefix, device=x.device), cells + self.prefix])
        return Pass(start=h * w, place=torch.arange(h * w, device=x.device), order=order, grid=(h, w))

    def run(self, work: Pass, i: int, block: Any, x: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        """Run a block on tokens (B, T, D)."""
        state, method = work.states[i], self.method
        index = self._index(work, state, len(x))
        inside = take(x, index) if self.restore and index is not None else x
        step = Step(
            args=args,
            given=given,
            prefix=self.prefix,
            bias=self._bias(state, x.dtype),
            index=index,
            heard=self.hears(work, i),
        )
        self.step = step
        try:
            y = inside + self.encoder.attend(block, inside, step)
        finally:
            self.step = None
        if not method.after:
            y = self._reduce(work, i, block, step, y)
        fed = self.encoder.feed(block, y)
        y = y if fed is None else y + fed
        if method.after:
            y = self._reduce(work, i, block, step, y)
        return self._leave(work, work.states[i + 1], x, y)

    def _index(self, work: Pass, state: State, batch: int) -> Tensor | None:
        """Place of every token in the tower's own sequence, (B, T); None if that is where they are."""
        if state.index is None:
            return None if work.order is None else work.order.expand(batch, -1)
        index = spread_tokens(state.index, self.prefix, self.group)
        return index if work.order is None else work.order[index]

    def _bias(self, state: State, dtype: torch.dtype) -> Tensor | None:
        """Logarithm of the sizes, as far as the method wants it; fillers are never seen."""
        if state.sizes is None or not (self.method.proportional or state.ragged):
            return None
        sizes = state.sizes if self.method.proportional else (state.sizes > 0).float()
        lead, rest = sizes[:, : self.prefix], sizes[:, self.prefix :]
        tokens = torch.cat([lead, rest.repeat_interleave(self.group, dim=1)], dim=1) if self.group > 1 else sizes
        return tokens.log().to(dtype)[:, None, None]

    def _reduce(self, work: Pass, i: int, block: Any, step: Step, y: Tensor) -> Tensor:
        """Ask the method, once per forward (gradient checkpointing runs a block again), and reduce y."""
        state = work.states[i]
        if len(work.states) == i + 1:
            found = self._ask(work, i, block, state, step, y) if step.heard else None
            work.states.append(state if found is None else state.after(found))
        new = work.states[i + 1]
        if new is state or new.step is None:
            return y
        return spread_out(new.step, self.prefix, self.group).apply(y)

    def _ask(self, work: Pass, i: int, block: Any, state: State, step: Step, y: Tensor) -> Reduction | None:
        count = (y.shape[1] - self.prefix) // self.group + self.prefix
        sizes = torch.ones(len(y), count, device=y.device) if state.sizes is None else state.sizes
        place = work.place.expand(len(y), -1)
        if state.index is not None:
            place = take(place, state.index[:, self.prefix :] - self.prefix)
        with torch.no_grad():
            return self.method.in_block(
                BlockView(
                    layer=i,
                    depth=self.depth,
                    prefix=self.prefix,
                    start=work.start,
                    hidden=y,
                    queries=step.queries,
                    keys=step.keys,
                    content=step.content,
                    scale=self.encoder.scale(block),
                    bias=step.bias,
                    group=self.group,
                    sizes=sizes,
                    place=place,
                    grid=work.grid,
                    class_token=self.encoder.class_token(self.tower),
                    memory=work.memory,
                )
            )

    def _leave(self, work: Pass, state: State, x: Tensor, y: Tensor) -> Tensor:
        """The block's output as the tower expects it."""
        if not self.restore or (state.index is None and work.order is None):
            return y
        full = y
        if state.total is not None:
            total = spread_out(state.total, self.prefix, self.group)
            full = total.unmerge(y)
            if total.links is None or total.drops:
                before = x if work.order is None else x[:, work.order]
                full = torch.where((total.labels() >= 0).unsqueeze(-1), full, before)
        return full if work.order is None else full[:, work.order.argsort()]


class BlockForward:
    """Stands in for the forward of one block; an object, so that towers can be copied and pickled."""

    def __init__(self, runtime: TowerRuntime, layer: int, block: nn.Module, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.__wrapped__ = original
        self.runtime, self.layer, self.block = runtime, layer, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; see its own documentation."""
        if not args:
            name = next(name for name in ("hidden_states", "x", "q_x") if name in kwargs)
            x, given = kwargs[name], {k: v for k, v in kwargs.items() if k != name}
        else:
            x, given = args[0], kwargs
        y = self.runtime.forward(self.layer, self.block, x, args[1:], given)
        return self.__wrapped__(*args, **kwargs) if y is None else y


class Listener:
    """Forward hook that takes down queries or keys."""

    def __init__(self, runtime: TowerRuntime, block: nn.Module, role: str) -> None:
        self.runtime, self.block, self.role = runtime, block, role

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Note the output, and the keys or queries that attention makes of it."""
        step, encoder = self.runtime.step, self.runtime.encoder
        if step is None or not step.heard:
            return
        with torch.no_grad():
            heads = encoder.split(self.block, output.detach())
            if self.role == "queries":
                step.queries = encoder.rotate(self.block, heads, step)
            else:
                step.content = heads
                step.keys = encoder.rotate(self.block, heads, step)


@contextlib.contextmanager
def working(tower: Any, method: VisionMethod, *, restore: bool = False, side: int = 1) -> Iterator[Any]:
    """Do a method's work in a tower inside the block.

    Args:
        tower: The tower.
        method: What to do.
        restore: Give every block's output at the full length.
        side: Side of the square of patches that the host joins to one token.

    Raises:
        TypeError: The tower is of no known kind.
    """
    runtime = runtime_for(tower, method, restore=restore, side=side)
    handle = Handle()
    try:
        runtime.install(handle)
        yield runtime
    finally:
        handle.remove()


def runtime_for(tower: Any, method: VisionMethod, *, restore: bool, side: int) -> TowerRuntime:
    """The runtime that fits a tower.

    Raises:
        TypeError: It is of no known kind.
    """
    encoder = encoder_of(tower)
    if encoder is None:
        raise TypeError(
            f"A {type(tower).__name__} is no known vision transformer, so nothing can be merged inside it. "
            "Use a method that works between tower and language model, or inside it."
        )
    encoder.check(tower)
    if encoder.flat:
        from vistok.plugins.packed import PackedRuntime

        return PackedRuntime(encoder, tower, method)
    return TowerRuntime(encoder, tower, method, restore=restore, side=side)
