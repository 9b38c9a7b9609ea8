"""How many tokens stay: a count, a share, an average over layers, or a share of the FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HostShape:
    """What a budget must know of the language model.

    Attributes:
        depth: Number of decoder layers.
        width: Hidden size.
        mlp: Inner size of the gated MLP.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
    """

    depth: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int

    def layer_flops(self, tokens: int, keys: int | None = None) -> int:
        """FLOPs (two per multiply-add) of one decoder layer.

        Projections 2n(2 d H e + 2 d G e), attention 4 n L H e over L keys (the square, as kernels count it), gated MLP
        6 n d m, for n tokens, width d, H heads and G key heads of e, inner width m.

        Args:
            tokens: Tokens entering the layer.
            keys: Keys they attend to; by default themselves.
        """
        keys = tokens if keys is None else keys
        query, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = 2 * tokens * self.width * (2 * query + 2 * shared)
        return projections + 4 * tokens * keys * query + 6 * tokens * self.width * self.mlp

    def cache_elements(self) -> int:
        """Numbers that one token leaves in the cache of one layer."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many image tokens may stay; give exactly one.

    Attributes:
        count: Tokens per image after the last cut.
        ratio: Share of an image's tokens after the last cut, in (0, 1].
        mean: Image tokens per image *entering* a layer, averaged over the layers (the published "192 tokens" of
            several papers count tokens leaving a layer, which flatters the method).
        flops: Share of the FLOPs that the image's tokens cost in the unpruned language model, in (0, 1].
    """

    count: int | None = None
    ratio: float | None = None
    mean: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            raise ValueError(
                f"A Budget takes exactly one of count, ratio, mean and flops, got {given or 'none'}. "
                "Write for example Budget(mean=192)."
            )
        ((name, value),) = given.items()
        if value <= 0 or (name in ("ratio", "flops") and value > 1):
            allowed = "in (0, 1]" if name in ("ratio", "flops") else "above 0"
            raise ValueError(f"Budget({name}={value}): it has to be {allowed}.")


def check_keep(keep: int | float | Budget | None) -> None:
    """Refuse a `keep` that means nothing.

    Raises:
        ValueError: An int below 1, a float outside (0, 1].
        TypeError: Something else.
    """
    if keep is None or isinstance(keep, Budget):
        return
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"keep is an int (tokens per image), a float (share) or a Budget, got {keep!r}.")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep={keep}: an int is a number of tokens per image and at least 1.")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: a float is a share of an image's tokens, in (0, 1]. Give an int for a count.")


def rescale(ratios: Sequence[float], keep: float) -> tuple[float, ...]:
    """A published schedule with another end: r' = 1 - (1 - r)(1 - keep) / (1 - r_last)."""
    last = ratios[-1]
    return tuple(keep + (r - last) * (1 - keep) / (1 - last) for r in ratios)


def default_layers(published: Sequence[int], depth: int, of: int = 32) -> tuple[int, ...]:
    """Layers of a paper on a model of another depth: scaled, rounded, strictly increasing, inside 1..depth-1.

    Raises:
        ValueError: The model has fewer layers than the schedule needs.
    """
    if depth - 1 < len(published):
        raise ValueError(
            f"A schedule of {len(published)} cuts needs {len(published) + 1} layers; the model has {depth}."
        )
    layers: list[int] = []
    for j, layer in enumerate(published):
        low = layers[-1] + 1 if layers else 1
        high = depth - (len(published) - j)
        layers.append(min(max(round(layer * depth / of), low), high))
    return tuple(layers)


def tokens_per_layer(n: int, layers: Sequence[int], counts: Sequence[int], depth: int) -> list[int]:
    """Image tokens entering every layer, for cuts before `layers` down to `counts`."""
    entering, now = [], n
    for layer in range(depth):
        for cut, count in zip(layers, counts):
            if cut == layer:
                now = count
        entering.append(now)
    return entering


def solve_count(budget: Budget, n: int, host: HostShape, plan: Callable[[float], list[int]]) -> int:
    """Tokens of an image of n after the last cut that meet a budget, for a given schedule.

    Args:
        budget: What is wanted.
        n: Tokens of the image.
        host: The language model.
        plan: Image tokens entering every layer for a final share in (0, 1].

    Returns:
        At least 1, at most n.

    Raises:
        ValueError: The budget is below what the schedule costs even with one token left.
    """
    if budget.count is not None:
        return min(budget.count, n)
    if budget.ratio is not None:
        return max(1, round(n * budget.ratio))
    full = host.depth * host.layer_flops(n)

    def cost(share: float) -> float:
        entering = plan(share)
        if budget.mean is not None:
            return sum(entering) / len(entering)
        return sum(host.layer_flops(t) for t in entering) / full

    target = budget.mean if budget.mean is not None else budget.flops
    assert target is not None
    if cost(1 / n) > target:
        raise ValueError(
            f"{budget} cannot be met for an image of {n} tokens: the layers before the last cut alone cost "
            f"{cost(1 / n):.4g}. Choose a larger budget or earlier layers."
        )
    low, high = 1, n
    while low < high:  # the largest count within the budget
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle / n) <= target else (low, middle - 1)
    return low
