"""Frame merging: neighbouring frames of a clip that look alike become one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.greedy import unit
from vistok.compress.grid import cell_of, centre_of, combine, fit_grid
from vistok.compress.method import FeatureMethod, first_tokens
from vistok.compress.reduction import Reduction
from vistok.compress.signals import Signals
from vistok.registry import register


def merge_neighbours(frames: Tensor, count: int) -> Tensor:
    """Group of every frame when the most similar neighbours are merged until `count` groups are left.

    The similarity of two groups is the cosine of their mean tokens, place by place, on average.

    Args:
        frames: (T, P, D).
        count: Groups to leave, 1..T.

    Returns:
        Non-decreasing int64, (T,).
    """
    mean = frames.float()
    size = torch.ones(len(frames), device=frames.device)
    while len(mean) > count:
        direction = unit(mean)
        i = int((direction[1:] * direction[:-1]).sum(-1).mean(-1).argmax())
        both = size[i] + size[i + 1]
        joined = (mean[i] * size[i] + mean[i + 1] * size[i + 1]) / both
        mean = torch.cat([mean[:i], joined[None], mean[i + 2 :]])
        size = torch.cat([size[:i], both[None], size[i + 2 :]])
    return torch.repeat_interleave(torch.arange(len(size), device=frames.device), size.long())


@register("method", "frame_merge")
class FrameMerge(FeatureMethod):
    """Means over runs of similar frames, token by token, for clips; pictures are left alone. A construction of ours.

    Works on the video inputs of LLaVA-OneVision and the Qwen families. A budget of less than one frame also averages
    neighbouring tokens of the one frame that is left.

    Args:
        keep: Tokens left: an int per clip, a float share, or a `Budget`. As many whole frames as fit.
        reference: Count the positions anew.
    """

    merges = True
    needs = frozenset({"grid"})
    modalities = frozenset({"video"})
    door: ClassVar[dict[str, Any] | None] = None

    def __init__(self, *, keep: int | float | Budget = 0.25, reference: bool = False) -> None:
        super().__init__(keep=keep, reference=reference)

    def promise(self, count: int, grid: tuple[int, ...] | None, length: int) -> int:
        """Whole frames, or a smaller one."""
        *frames, h, w = self.grid_of(grid, length)
        if not frames:
            return min(count, length)
        groups = max(1, min(frames[0], count // (h * w)))
        small = fit_grid((h, w), count) if count < h * w else (h, w)
        return groups * small[0] * small[1]

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """Means over runs of frames."""
        assert count is not None
        grid = self.grid_of(signals.grid, signals.length)
        if len(grid) == 2:  # a clip of one frame
            grid = (1, *grid)
        t, h, w = grid
        small = fit_grid((h, w), count) if count < h * w else (h, w)
        groups = max(1, min(t, count // (h * w)))
        if groups == t and small == (h, w):
            return first_tokens(signals, signals.length)
        device = signals.features.device
        group = merge_neighbours(signals.features.view(t, h * w, -1), groups)
        cell = combine([cell_of(o, n, device) for o, n in zip((h, w), small)], small)
        per_group = small[0] * small[1]
        links = (group.unsqueeze(1) * per_group + cell).flatten()
        sizes = torch.bincount(links, minlength=groups * per_group)
        span = torch.bincount(group, minlength=groups)
        middle = span.cumsum(0) - span + (span - 1) // 2
        place = combine([centre_of(o, n, device) for o, n in zip((h, w), small)], (h, w))
        index = (middle.unsqueeze(1) * (h * w) + place).flatten()
        weights = 1 / sizes[links].float()
        return Reduction(index[None], sizes[None], signals.length, links.view(1, -1, 1), weights.view(1, -1, 1))
