"""Bootstrap intervals of means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bootstrap_interval(
    values: Sequence[float] | Tensor, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over pictures.

    It says how far the mean would move with other pictures of the same kind, not with another training seed.

    Args:
        values: One value per picture.
        level: Share of resampled means inside.
        samples: Resampled means.
        seed: Of the resampling, so that the interval reproduces.

    Returns:
        Lower and upper end; twice the value itself for a single picture.

    Raises:
        ValueError: No values.
    """
    values = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
    if not len(values):
        raise ValueError("A bootstrap interval needs at least one value.")
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    # resamples in slices of bounded memory
    rows = max(1, 4_000_000 // n)
    means = [
        values[torch.randint(n, (min(rows, samples - start), n), generator=generator)].mean(1)
        for start in range(0, samples, rows)
    ]
    tail = (1.0 - level) / 2.0
    ends = torch.quantile(torch.cat(means), torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
