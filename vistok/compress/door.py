"""A door for serving engines: how many tokens of a picture stay, promised first, then which.

Engines count placeholders before the tower runs, so a selection is two plain functions: `count`, from the number of
tokens alone, and `keep`, from what the encoder gives, which returns exactly that many sorted indices, for one picture,
always the same, without an attention map.

    from vistok.compress.door import count, keep, methods
    from vistok.compress.signals import Signals

    budget = 0.25                                    # or an int, or Budget(count=144)
    placeholders = count(576, budget)                # while the prompt is built: 144
    ...                                              # the engine schedules, runs the tower and the projector
    index = keep(features, budget, method="divprune")                    # features (576, D) -> (144,) int64
    assert len(index) == placeholders
    embeddings[image_columns] = features[index]

    seen = Signals(features=features, grid=(24, 24), cls_row=row)        # row: attention of the class token, (576,)
    index = keep(seen, budget, method="fastervlm")
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.method import FeatureMethod, first_tokens
from vistok.compress.signals import Signals
from vistok.config import create
from vistok.registry import list_names, registry


def methods(*, signals: bool = False) -> list[str]:
    """Names of the methods that fit through the door: selections of as many tokens as were promised.

    Args:
        signals: Those too that read more than features, such as the attention of the tower's class token.
    """
    found = {name: registry("method").resolve(name)[1] for name in list_names("method")}
    return [n for n, b in found.items() if _fits(b) and (signals or b.needs <= {"grid", "text"})]  # type: ignore[attr-defined]


def _fits(builder: Any) -> bool:
    return isinstance(builder, type) and issubclass(builder, FeatureMethod) and builder.door is not None


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
    features: Tensor | Signals,
    budget: int | float | Budget,
    *,
    method: str = "random_features",
    grid: tuple[int, ...] | None = None,
    **config: Any,
) -> Tensor:
    """Which tokens of one picture (one grid: crops one by one) stay.

    Args:
        features: What the projector gives, (N, D), or `Signals` with whatever else the method reads.
        budget: As for `count`.
        method: One of `methods(signals=True)`. Those that merge as published select only here.
        grid: (h, w) or (t, h, w), for methods that use it.
        **config: Further settings of the method.

    Returns:
        Sorted indices, int64, exactly `count(N, budget)` of them.

    Raises:
        ValueError: A method that is no selection, signals it misses, or a promise it does not keep.
    """
    _, builder, _ = registry("method").resolve(method)
    if not _fits(builder):
        raise ValueError(
            f"{method!r} needs more than features or merges tokens. Those that fit: {methods(signals=True)}."
        )
    built: FeatureMethod = create("method", method, keep=budget, **{**builder.door, **config})  # type: ignore[attr-defined]
    signals = features if isinstance(features, Signals) else Signals(features=features, grid=grid)
    promised = count(signals.length, budget)
    if promised == signals.length:
        return first_tokens(signals, promised).index[0]
    index: Tensor = built.compress(signals, promised).index[0].sort().values
    if len(index) != promised:
        raise ValueError(f"{method!r} promised {promised} tokens and gave {len(index)}.")
    return index
