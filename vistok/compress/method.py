"""`Method`: what every compression method is. A file in `methods/` adds one; nothing else changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vistok.compress.budget import Budget, HostShape, check_keep, default_layers, rescale, solve_count, tokens_per_layer
from vistok.compress.crops import share_out
from vistok.compress.reduction import Reduction
from vistok.compress.score import Direction, Row
from vistok.compress.signals import Signals
from vistok.compress.view import View

Stage = Literal["vision", "features", "prefill", "decode"]
Rounding = Literal["floor", "round"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One removal inside the language model during prefill.

    Attributes:
        layer: Layer in front of which tokens go.
        source: Layer whose attention is read, None if none is. Below `layer` its own attention after it ran; equal to
            `layer` the attention that layer is about to compute (it costs one more key projection).
    """

    layer: int
    source: int | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a method decided at a cut.

    Attributes:
        reduction: Over all columns; None if every token stays.
        counts: Tokens left per sample and image.
    """

    reduction: Reduction | None
    counts: list[list[int]]


class Method:
    """Base of all methods; says what a method does not do, so that each states only what it does.

    Attributes:
        stages: Where the method acts.
        merges: It merges tokens (else it only selects).
        needs: What it wants to know. Of a `features` method a subset of pixels, grid, keys, cls_row, levels, text,
            crops (how the crops of a picture lie), class_token, one_grid (pictures of one grid, without newlines); of
            a `vision` method keys, cls_row, attention.
        trained: It has weights of its own that have to be trained or loaded.
        per_head: A `decode` method that evicts per key/value head.
        reference: Published behaviour instead of the defaults.
        renumber: Positions are counted anew after a cut; otherwise tokens keep theirs.
        direction: Which token transition is summed, see `score.transition`.
        accumulate: Layers whose token transitions are summed.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset()
    merges: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()
    trained: ClassVar[bool] = False
    per_head: bool = False
    reference: bool = False
    direction: Direction = "signed"

    @property
    def renumber(self) -> bool:
        """Whether positions are renumbered."""
        return False

    @property
    def shortens_prompt(self) -> bool:
        """Whether fewer features than the tower's patches reach the language model."""
        return bool(self.stages & {"vision", "features"})

    @property
    def scope(self) -> Literal["image", "row"]:
        """What a budget counts over: every image (default) or all image tokens of a sample (published code)."""
        return "row" if self.reference else "image"

    def cuts(self, depth: int) -> list[Cut]:
        """Cuts inside a language model of that depth."""
        return []

    def accumulate(self, depth: int) -> range:
        """Layers whose token transition variation is summed up."""
        return range(0)

    def rows(self, view: View) -> Tensor | None:
        """Query rows that the method scores with, a mask over the uncompressed prompt, (B, L)."""
        return None

    def reduce(self, view: View, host: HostShape) -> Decision:
        """Decide at a prefill cut."""
        raise NotImplementedError

    def window(self, view: View) -> Tensor | None:
        """Query rows whose attention decides about the cache, a mask over the current columns, (B, L)."""
        return None

    def evicted_layers(self, depth: int) -> range:
        """Layers whose cache shrinks after prefill; never layer 0, whose length tells the prompt's length."""
        return range(0)

    def evict(self, view: View, received: Tensor | None, host: HostShape) -> Decision:
        """Decide what stays in the cache of a layer.

        Args:
            view: The columns of this layer.
            received: Attention mass that every key received from the window, summed over rows and the query heads of
                a key head, float32, (B, kv_heads, L).
            host: The language model.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Settings as given, for reports."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}


class ScheduledMethod(Method):
    """A method that cuts to a known number of tokens in front of given layers.

    Attributes:
        published_layers: Layers of the paper, for a model of 32.
        published_ratios: Share of an image's tokens left after each cut.
        rounding: How a share becomes a number.
    """

    stages = frozenset({"prefill"})
    published_layers: ClassVar[tuple[int, ...]] = ()
    published_ratios: ClassVar[tuple[float, ...]] = ()
    rounding: ClassVar[Rounding] = "floor"

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        layers: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
        reference: bool = False,
    ) -> None:
        check_keep(keep)
        self.keep = keep
        self.layers = None if layers is None else tuple(layers)
        self.ratios = tuple(self.published_ratios if ratios is None else ratios)
        self.reference = reference
        cuts = len(self.ratios if self.layers is None else self.layers)
        if cuts != len(self.ratios) or not self.ratios:
            raise ValueError(
                f"{len(self.layers or ())} layers and {len(self.ratios)} ratios: give one ratio per layer."
            )
        if list(self.ratios) != sorted(self.ratios, reverse=True) or not 0 < self.ratios[-1] <= self.ratios[0] <= 1:
            raise ValueError(f"ratios={list(self.ratios)}: shares of the original tokens fall and lie in (0, 1].")

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        """Layers in front of which the cuts fall.

        Raises:
            ValueError: Explicit layers that are not increasing inside 1..depth-1.
        """
        if self.layers is None:
            scaled = default_layers(self.published_layers, depth)
            return scaled if len(scaled) == len(self.ratios) else scaled[-len(self.ratios) :]
        check_layers(self.layers, depth)
        return self.layers

    def cuts(self, depth: int) -> list[Cut]:
        """One cut per ratio, scored by `source_of`."""
        return [Cut(layer=layer, source=self.source_of(layer)) for layer in self.cut_layers(depth)]

    def source_of(self, layer: int) -> int | None:
        """Layer whose attention the cut in front of `layer` reads."""
        return None

    def schedule(self, n: int, share: float | None) -> list[int]:
        """Tokens of an image of n after every cut, for a final share (None: the published one)."""
        ratios = self.ratios
        if share is not None:
            ratios = rescale(ratios, share) if ratios[-1] < 1 else (share,) * len(ratios)
        to_int = round if self.rounding == "round" else math.floor
        floor = 0 if self.reference else 1
        return [max(floor, min(n, to_int(n * r + (0 if self.rounding == "round" else 1e-9)))) for r in ratios]

    def quota(self, n: int, host: HostShape) -> list[int]:
        """Tokens of an image of n after every cut, under `keep`."""
        if n == 0 or self.keep is None:
            return self.schedule(n, None)
        if isinstance(self.keep, float):
            return self.schedule(n, self.keep)
        layers = self.cut_layers(host.depth)

        def plan(share: float) -> list[int]:
            return tokens_per_layer(n, layers, self.schedule(n, share), host.depth)

        budget = Budget(count=self.keep) if isinstance(self.keep, int) else self.keep
        count = solve_count(budget, n, host, plan)
        return [*self.schedule(n, count / n)[:-1], count]

    def reduce(self, view: View, host: HostShape) -> Decision:
        """Keep the best-scored tokens of every image."""
        quotas = [[self.quota(n, host)[view.stage] for n in row] for row in view.sizes]
        quotas = [[min(q, n) for q, n in zip(row, now)] for row, now in zip(quotas, view.counts)]
        if quotas == view.counts:
            return Decision(reduction=None, counts=view.counts)
        return Decision(reduction=view.keep_top(self.scores(view), quotas), counts=quotas)

    def scores(self, view: View) -> Tensor:
        """Score of every token, larger is better, (B, L) float32 or float64."""
        raise NotImplementedError


class FeatureMethod(Method):
    """A method between tower and language model: the prompt itself becomes shorter.

    The number of tokens is promised first and depends on nothing but the grid, so that serving engines, which count
    placeholders before the tower runs, can use it too. A method whose `keep` may be None decides the number itself.

    Attributes:
        at: Whether it looks at (and merges) features in front of the projector or behind it.
        per_crop: Crops of a picture are reduced one by one, not as one mosaic.
        modalities: What it acts on; the rest is left alone.
        blocks: Tower blocks whose attention and keys it reads: from the end if negative, else of a tower of 24.
        row: What it wants to know of the class token: probabilities (mean over heads), logits (the same), or the
            probabilities of all heads as one wide head.
        rounding: How a share of an image becomes a number.
        door: Settings that make it a pure selection of a promised size, None if there are none.
    """

    stages = frozenset({"features"})
    at: ClassVar[Literal["tower", "projected"]] = "projected"
    per_crop: ClassVar[bool] = False
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    blocks: tuple[int, ...] = (-2,)
    row: ClassVar[Row] = "probability"
    rounding: ClassVar[Rounding] = "round"
    door: ClassVar[dict[str, Any] | None] = {}

    def __init__(self, *, keep: int | float | Budget | None, reference: bool = False) -> None:
        check_keep(keep)
        self.keep = keep
        self.reference = reference

    @property
    def renumber(self) -> bool:
        """Published code builds the short prompt first, so it counts anew."""
        return self.reference

    @property
    def in_order(self) -> bool:
        """Whether the outputs of an image follow their places in it; else they stay in the method's own order."""
        return True

    def wanted(self) -> frozenset[str]:
        """What it wants to know under its settings."""
        return self.needs

    def count(self, n: int, host: HostShape | None = None) -> int:
        """Tokens of an image of n that the budget allows, 1..n; `host` is needed for a budget of FLOPs alone."""
        if self.keep is None:
            raise ValueError(f"{type(self).__name__} decides by content how many tokens stay. Give `keep` to fix it.")
        if isinstance(self.keep, float):
            return max(1, min(n, math.floor(n * self.keep) if self.rounding == "floor" else round(n * self.keep)))
        if isinstance(self.keep, int):
            return min(self.keep, n)
        if self.keep.mean is not None:  # every layer sees the same tokens
            return max(1, min(n, math.floor(self.keep.mean)))
        if self.keep.flops is not None and host is None:
            raise ValueError(f"{self.keep} needs the sizes of the language model. Give a count or a ratio here.")
        depth = 1 if host is None else host.depth

        def plan(share: float) -> list[int]:
            return [max(1, round(n * share))] * depth

        sizes = host or HostShape(depth=1, width=1, mlp=1, heads=1, kv_heads=1, head_dim=1)
        return solve_count(self.keep, n, sizes, plan)

    def promise(self, count: int, grid: tuple[int, ...] | None, length: int) -> int:
        """Tokens that `compress` will give for a grid when it may keep `count` of `length`."""
        return min(count, length)

    def budgets(self, parts: Sequence[Signals], count: int) -> list[int]:
        """How many tokens each part of an image may keep; by default in proportion to its size."""
        lengths = [part.length for part in parts]
        return share_out(count, lengths, lengths, least=1)

    def survey(self, rows: Sequence[Tensor]) -> None:
        """Under `reference`: the class token's attention in all images of a batch, for what is decided batch-wide."""

    def compress_image(self, parts: Sequence[Signals], count: int | None) -> list[Reduction]:
        """Reduce the parts of one image (grids, or crops under `per_crop`).

        Args:
            parts: What is known of each; (N,) tokens.
            count: Tokens of the whole image that may stay, None if the method decides.

        Returns:
            One reduction per part, (1, M) each.
        """
        if count is None:
            return [self.compress(part, None) for part in parts]
        shares = self.budgets(parts, count)
        return [
            self.compress(part, share) if 0 < share < part.length else first_tokens(part, share)
            for part, share in zip(parts, shares)
        ]

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """Reduce one grid of tokens to `promise(count, ...)` tokens, (1, M)."""
        raise NotImplementedError

    def mix(self, tokens: Tensor, reduction: Reduction, signals: Signals) -> Tensor:
        """Last word on the tokens of an image of one grid, (M, D) -> (M', D), M' >= M; by default nothing changes."""
        return tokens

    def grid_of(self, grid: tuple[int, ...] | None, length: int) -> tuple[int, ...]:
        """The grid, which this method needs.

        Raises:
            ValueError: The tokens lie on none.
        """
        if grid is None:
            raise ValueError(
                f"{type(self).__name__} works on a grid, and the {length} tokens of this image lie on none that the "
                "family knows. Use a method that selects tokens."
            )
        return grid


def first_tokens(signals: Signals, count: int) -> Reduction:
    """All tokens of a part that keeps all, none of one that keeps none."""
    index = torch.arange(count, device=signals.features.device).unsqueeze(0)
    return Reduction(index, torch.ones_like(index), signals.length)


def selection(index: Tensor, length: int) -> Reduction:
    """The reduction that keeps the tokens at `index` (M,), in ascending order."""
    index = index.sort().values.unsqueeze(0)
    return Reduction(index, torch.ones_like(index), length)


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Refuse layers that a model of that depth cannot be cut at.

    Raises:
        ValueError: Not strictly increasing inside 1..depth-1.
    """
    rising = all(a < b for a, b in itertools.pairwise(layers))
    if not layers or not rising or layers[0] < 1 or layers[-1] > depth - 1:
        raise ValueError(
            f"layers={list(layers)}: cuts fall in front of layers 1..{depth - 1} of this model, strictly increasing. "
            "To drop tokens before the first layer use a method of the features stage."
        )


def attention_received(view: View) -> Tensor:
    """Mean over heads and query rows of the probabilities in a view, (B, L) float32."""
    assert view.attention is not None and view.row_valid is not None
    mean = view.attention.mean(1)  # (B, R, L)
    weight = view.row_valid.unsqueeze(-1).to(mean.dtype)
    return (mean * weight).sum(1) / weight.sum(1).clamp_min(1)
