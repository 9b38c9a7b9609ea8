"""A door for serving engines: how many tokens of a picture stay, promised first, then which.

Engines count placeholders before the tower runs, so a selection is two plain functions: `count`, from the number of
tokens alone, and `keep`, from the features alone, which gives exactly that many sorted indices, for one picture, always
the same, without an attention map.

    from vistok.compress.door import count, keep, methods

    budget = 0.25                                    # or an int, or Budget(count=144)
    placeholders = count(576, budget)                # while the prompt is built: 144
    ...                                              # the engine schedules, runs the tower and the projector
    index = keep(features, budget, method="random_features", seed=1)     # features (576, D) -> (144,) int64
    assert len(index) == placeholders
    embeddings[image_columns] = features[index]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.method import FeatureMethod
from vistok.compress.signals import Signals
from vistok.config import create
from vistok.registry import list_names, registry


def methods() -> list[str]:
    """Names of the methods that fit through the door: pure selections that need nothing but features."""
    return [name for name in list_names("method") if _fits(registry("method").resolve(name)[1])]


def _fits(builder: Any) -> bool:
    return (
        isinstance(builder, type)
        and issubclass(builder, FeatureMethod)
        and not builder.merges
        and builder.needs <= {"grid"}
    )


def count(n: int, budget: int | float | Budget) -> int:
    """Tokens of a picture of n that stay, 1..n.

    Args:
        n: Tokens that the tower gives.
        budget: An int is a number, a float a share, or a `Budget` of count, ratio or mean.

    Raises:
        ValueError: A budget that means nothing here.
    """
    return FeatureMethod(keep=budget).count(n)


def keep(
    features: Tensor,
    budget: int | float | Budget,
    *,
    method: str = "random_features",
    grid: tuple[int, ...] | None = None,
    **config: Any,
) -> Tensor:
    """Which tokens of one picture stay.

    Args:
        features: What the projector gives, (N, D).
        budget: As for `count`.
        method: One of `methods()`.
        grid: (h, w) or (t, h, w), for methods that use it.
        **config: Further settings of the method.

    Returns:
        Sorted indices, int64, exactly `count(N, budget)` of them.

    Raises:
        ValueError: A method that needs more than features, or does not keep its promise.
    """
    built = create("method", method, keep=budget, **config)
    if not _fits(type(built)):
        raise ValueError(f"{method!r} needs more than features or merges tokens. Those that fit: {methods()}.")
    promised = count(len(features), budget)
    index: Tensor = built.compress(Signals(features=features, grid=grid), promised).index[0].sort().values
    if len(index) != promised:
        raise ValueError(f"{method!r} promised {promised} tokens and gave {len(index)}.")
    return index
