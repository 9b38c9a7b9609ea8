"""`VisionMethod`: reduction inside a vision tower, and what such a method sees of a block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.compress.budget import Budget, check_keep, default_layers, rescale, tokens_per_layer
from vistok.compress.method import Method
from vistok.compress.reduction import Reduction

Rate = int | Sequence[int | float]


@dataclass(kw_only=True)
class BlockView:
    """The tokens of a tower between attention and MLP of a block (or after the block).

    Tokens are patches, or the groups of patches that a host joins before its language model (2x2 in Qwen, pixel
    shuffle in InternVL); leading prefix tokens (class, distillation, registers) come first.

    Attributes:
        layer: The block, from 0.
        depth: Blocks of the tower.
        prefix: Leading tokens that always stay.
        start: Tokens without the prefix at the first block.
        hidden: States of the *patches*, (B, T, D).
        queries: Of this block's attention, as it used them, (B, heads, T, d), or None if they were not asked for.
        keys: The same of the keys.
        content: Keys before rotary positions were applied, (B, heads, T, d).
        scale: Factor of the logits.
        bias: What was added to the logits, (B, 1, 1, T), None for nothing.
        group: Patches to a token behind the prefix.
        sizes: Patches (of the tower; groups if `group` > 1) each token stands for, float32, (B, N); 0 at fillers.
        place: Raster place of every token behind the prefix, (B, N - prefix).
        grid: (h, w) of the tokens at the first block, None if unknown.
        class_token: Token 0 summarises the picture.
        memory: Belongs to this forward of the tower; a method may keep things here between blocks.
    """

    layer: int
    depth: int
    prefix: int
    start: int
    hidden: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    content: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    group: int = 1
    sizes: Tensor
    place: Tensor
    grid: tuple[int, ...] | None = None
    class_token: bool = False
    memory: dict[str, Any]

    @property
    def count(self) -> int:
        """Tokens, prefix included, N."""
        return self.sizes.shape[1]

    @property
    def metric(self) -> Tensor:
        """Keys without rotary phase, mean over heads (and over the patches of a group), float32, (B, N, d)."""
        assert self.content is not None
        return self._joined(self.content.float().mean(1), mean=True)

    @property
    def tokens(self) -> Tensor:
        """States of the tokens behind the prefix, the patches of a group side by side, (B, N - prefix, group * D)."""
        patches = self.hidden[:, self.prefix :]
        return patches.reshape(patches.shape[0], -1, self.group * patches.shape[2])

    def class_row(self) -> Tensor:
        """Attention of the class token to every token, mean over heads, float32, (B, N): O(N)."""
        assert self.queries is not None
        return self._rows(self.queries[:, :, :1])

    def received(self, rows: int | None = None, chunk: int = 256) -> Tensor:
        """Attention that every token receives, mean over heads and query rows, float32, (B, N).

        Args:
            rows: Evenly spaced query rows to use; all by default, which is O(N^2) time (memory: chunk x N).
            chunk: Rows at a time.
        """
        assert self.queries is not None
        total = self.queries.shape[2]
        used = total if rows is None else min(rows, total)
        picked = torch.arange(used, device=self.queries.device) * total // used
        found = [self._rows(self.queries[:, :, part]) * len(part) for part in picked.split(chunk)]
        return torch.stack(found).sum(0) / used

    def salience(self) -> Tensor:
        """The class token's attention; where there is no class token, attention received; float32, (B, N)."""
        return self.class_row() if self.class_token else self.received()

    def _rows(self, queries: Tensor) -> Tensor:
        """Mean over heads and the given rows of their probabilities, (B, N)."""
        assert self.keys is not None
        keys = self.keys
        if keys.shape[1] != queries.shape[1]:  # grouped heads
            keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        logits = (queries @ keys.transpose(2, 3)).float() * self.scale
        if self.bias is not None:
            logits = logits + self.bias.float()
        return self._joined(logits.softmax(-1).mean((1, 2)).unsqueeze(-1), mean=False).squeeze(-1)

    def _joined(self, x: Tensor, *, mean: bool) -> Tensor:
        """Values of patches as values of tokens, (B, T, C) -> (B, N, C)."""
        if self.group == 1:
            return x
        lead, rest = x[:, : self.prefix], x[:, self.prefix :]
        rest = rest.reshape(rest.shape[0], -1, self.group, rest.shape[2])
        return torch.cat([lead, rest.mean(2) if mean else rest.sum(2)], dim=1)


class VisionMethod(Method):
    """A method that makes tokens fewer inside a vision tower, alone or in front of a language model.

    Attributes:
        proportional: Attention is proportional to sizes: their logarithm is added to the logits (ToMe, equation 1).
        after: It acts after whole blocks, not between attention and MLP.
        restore: Every block gives back as many tokens as the tower began with (for dense prediction, feature maps and
            heads that need the grid). None: only where the model needs it.
    """

    stages = frozenset({"vision"})
    proportional: bool = True
    after: ClassVar[bool] = False
    restore: bool | None = None

    def active(self, layer: int, depth: int, start: int) -> bool:
        """Whether the method acts in a block; where it never does, the model is left bit for bit as it is.

        Args:
            layer: The block, from 0.
            depth: Blocks of the tower.
            start: Tokens behind the prefix at the first block.
        """
        raise NotImplementedError

    def watches(self, layer: int, depth: int, start: int) -> bool:
        """Whether the method wants to see a block in which it does not act."""
        return False

    def in_block(self, view: BlockView) -> Reduction | None:
        """Make the tokens of a block fewer: a reduction of all N, prefix first and untouched; None for none."""
        raise NotImplementedError

    def must_stay(self, memory: Mapping[str, Any]) -> Tensor | None:
        """Tokens behind the prefix that no later stage may drop, from what was kept in a view's memory, (B, M)."""
        return None


class ScheduledVisionMethod(VisionMethod):
    """A method whose number of tokens after every block is known beforehand.

    Args:
        keep: Patches left after the last block: an int, a share of what the tower began with, or a `Budget` of count,
            ratio or mean (for hosts that cut a picture into tiles: of every tile). None: what the schedule leaves.
        proportional: Proportional attention.
        restore: Full length after every block, see `VisionMethod`.
    """

    def __init__(self, *, keep: int | float | Budget | None, proportional: bool, restore: bool | None) -> None:
        check_keep(keep)
        if isinstance(keep, Budget):
            if keep.flops is not None:
                raise ValueError(f"{keep} counts a language model's FLOPs. In a vision tower give a count or a ratio.")
            keep = keep.ratio if keep.count is None and keep.mean is None else max(1, int(keep.count or keep.mean or 1))
        self.keep, self.proportional, self.restore = keep, proportional, restore

    def left(self, depth: int, start: int) -> list[int]:
        """Tokens behind the prefix after every block of a tower that begins with `start`."""
        raise NotImplementedError

    def target(self, start: int) -> int | None:
        """What `keep` comes to."""
        if self.keep is None:
            return None
        return min(self.keep, start) if isinstance(self.keep, int) else max(1, round(self.keep * start))

    def quota(self, view: BlockView) -> int:
        """Tokens behind the prefix to leave in this block."""
        return self.left(view.depth, view.start)[view.layer]

    def active(self, layer: int, depth: int, start: int) -> bool:
        """Where the schedule takes something away."""
        left = [start, *self.left(depth, start)]
        return left[layer + 1] < left[layer]


def rates(r: Rate, depth: int) -> list[int]:
    """Tokens to merge in every block (`parse_r` of ToMe).

    An int is for every block. `(r, inflection)` with an inflection in [-1.0, 1.0] rises (1.0), falls (-1.0) or stays
    (0.0) on a line of mean r, rounded down; it is told from two rates by its being a float or negative. A list of rates
    is literal and zeros follow it.

    Raises:
        ValueError: Something else, or more rates than blocks.
    """
    if isinstance(r, int):
        found = [r] * depth
    elif len(r) == 2 and (isinstance(r[1], float) or r[1] < 0):
        mean, inflection = r
        if not -1 <= inflection <= 1:
            raise ValueError(f"r={r}: the inflection lies in [-1, 1]: -1 falling, 0 constant, 1 rising.")
        low = int(mean * (1 - inflection))
        step = (2 * mean - 2 * low) / max(depth - 1, 1)
        found = [int(low + step * i) for i in range(depth)]
    else:
        found = [*map(int, r), *[0] * (depth - len(r))]
    if len(found) > depth or min(found, default=0) < 0:
        raise ValueError(f"r={r}: rates are not negative, and the tower has {depth} blocks.")
    return found


def falling(start: int, taken: Sequence[int], floor: Callable[[int], int]) -> list[int]:
    """Tokens left after every block when each takes what it may.

    Args:
        start: Tokens at the beginning.
        taken: Tokens to take away in every block.
        floor: Fewest tokens that may be left of a number of tokens.
    """
    return list(itertools.accumulate(taken, lambda now, r: max(now - r, floor(now)), initial=start))[1:]


def spread(start: int, end: int, shape: Sequence[int], floor: Callable[[int], int]) -> list[int]:
    """Tokens left after every block on the way from `start` to exactly `end`, in the proportions of a schedule.

    Args:
        start: Tokens at the beginning.
        end: Tokens after the last block.
        shape: How much each block takes, as proportions.
        floor: Fewest tokens that may be left of a number of tokens.

    Raises:
        ValueError: It cannot be reached.
    """
    gone, total = start - end, sum(shape)
    if gone <= 0:
        return [start] * len(shape)
    if total == 0:
        raise ValueError(f"keep leaves {end} of {start} patches, and the schedule merges in no block. Give a larger r.")
    share = list(itertools.accumulate(shape))
    for stretch in (1 + i / 8 for i in range(8 * 8 * len(shape))):  # blocks that may not take enough: begin faster
        left, now = [], start
        for part in share:
            wanted = start - min(gone, math.floor(stretch * gone * part / total + 0.5))
            now = max(min(now, wanted), floor(now))
            left.append(now)
        if now == end:
            return left
    raise ValueError(
        f"keep leaves {end} of {start} patches, and the tower's {len(shape)} blocks can take at most half of what they "
        "see. Keep more, or merge in more blocks."
    )


class StagedVisionMethod(ScheduledVisionMethod):
    """A method that acts in a few blocks, each time down to a share of the patches.

    Attributes:
        published_blocks: Default blocks, for a tower of 12, from 0.
        published_ratios: Default share left after each.

    Args:
        keep: Patches left after the last stage, see `ScheduledVisionMethod`.
        blocks: Blocks in which it acts, from 0, rising.
        ratios: Share of the patches left after each, falling.
        proportional: Proportional attention.
        restore: Full length after every block.
    """

    published_blocks: ClassVar[tuple[int, ...]] = ()
    published_ratios: ClassVar[tuple[float, ...]] = ()

    def __init__(
        self,
        *,
        keep: int | float | Budget | None,
        blocks: Sequence[int] | None,
        ratios: Sequence[float] | None,
        proportional: bool,
        restore: bool | None,
    ) -> None:
        super().__init__(keep=keep, proportional=proportional, restore=restore)
        self.blocks = None if blocks is None else tuple(blocks)
        self.ratios = tuple(self.published_ratios if ratios is None else ratios)
        if self.blocks is not None and len(self.blocks) != len(self.ratios):
            raise ValueError(f"{len(self.blocks)} blocks and {len(self.ratios)} ratios: give one ratio per block.")
        if not self.ratios or list(self.ratios) != sorted(self.ratios, reverse=True) or not 0 < self.ratios[-1] < 1:
            raise ValueError(f"ratios={list(self.ratios)}: shares of the patches fall and lie in (0, 1), the last too.")

    def stages_of(self, depth: int) -> tuple[int, ...]:
        """Blocks in which it acts.

        Raises:
            ValueError: Explicit blocks that are not rising inside 0..depth-1.
        """
        if self.blocks is None:
            shallow = depth <= len(self.published_blocks)  # as many of the last stages as there are blocks
            return tuple(range(depth)) if shallow else default_layers(self.published_blocks, depth, of=12)
        rising = all(a < b for a, b in itertools.pairwise(self.blocks))
        if not rising or not self.blocks[0] >= 0 or self.blocks[-1] > depth - 1:
            raise ValueError(f"blocks={list(self.blocks)}: blocks rise inside 0..{depth - 1} of this tower.")
        return self.blocks

    def left(self, depth: int, start: int) -> list[int]:
        """The share of the last stage passed."""
        end = self.target(start)
        ratios = self.ratios if end is None else rescale(self.ratios, end / start)
        counts = [max(1, min(start, round(start * ratio))) for ratio in ratios]
        stages = self.stages_of(depth)
        return tokens_per_layer(start, [b + 1 for b in stages], counts[-len(stages) :], depth + 1)[1:]
