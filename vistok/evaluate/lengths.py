"""How many tokens a picture needs: the shortest prefix of a nested tokenizer that reaches a quality, or fits a size."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vistok.evaluate.metric import Metric
from vistok.tokens import Tokens, overhead, packed_bytes


def fitting(tokenizer: Any, tokens: Tokens, size: int) -> Tokens:
    """The longest prefix of one picture's tokens whose whole `.vtok` file takes at most `size` bytes.

    Exact: the file is entropy-coded if the tokenizer has a prior, or packed where that is smaller or there is none, and
    everything beside the ids counts.

    Args:
        tokenizer: Nested, unless all its tokens fit.
        tokens: Of one picture.
        size: Bytes of the file.

    Raises:
        ValueError: Not even one token fits, or the tokenizer is not nested and its tokens do not fit.
    """
    full, bare = int(tokens.lengths[0]), tokenizer.portable(tokens)
    k = bisect_count(full, lambda n: overhead(bare, n) + packed_bytes(n, tokens.vocab) <= size)
    if tokenizer.coder is not None:
        assert tokens.ids is not None
        lengths = tokenizer.coder.lengths(tokens.ids[0, : min(full, len(tokenizer.coder))], size)
        k = max([k, *(n for n, length in enumerate(lengths, 1) if overhead(bare, n) + length <= size)])
    if k == 0 or (k < full and not tokenizer.nested):
        what = "even one token takes" if tokenizer.nested else f"all {full} tokens of {tokenizer.registry_name} take"
        raise ValueError(f"A file of {size} bytes is too small: {what} more.")
    return tokens[:, :k]


def bisect_count(most: int, holds: Any) -> int:
    """The largest n in 0..most with `holds(n)`, for a condition that holds up to some n."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


@torch.no_grad()
def shortest(tokenizer: Any, tokens: Tokens, images: Tensor, metric: Metric, goal: float) -> tuple[Tokens, Tensor]:
    """Shorten every picture's tokens to the fewest that reach a quality.

    Bisects all pictures at once: each round decodes one padded batch, every row cut to its own middle, so it takes
    about log2(K) decodes. The result was decoded and reaches the goal; that no shorter prefix does is certain as far as
    quality grows with length. Generative decoders get the same noise in every round.

    Args:
        tokenizer: A nested tokenizer.
        tokens: Tokens of `images`, as encoded.
        images: The preprocessed pictures, (B, 3, H, W) in [0, 1].
        metric: A per-picture metric.
        goal: Value to reach (at least it, or at most it, as the metric's direction says).

    Returns:
        The tokens with their new `lengths`, cut to the longest; and whether each row reaches the goal, bool (B,). Rows
        that do not even with all tokens keep all.

    Raises:
        ValueError: The tokenizer is not nested.
    """
    if not tokenizer.nested:
        raise ValueError(f"{tokenizer.registry_name} is not nested: it always needs {tokenizer.num_tokens} tokens.")
    full = tokens.lengths.clone()
    reached = _reaches(tokenizer, tokens, images, metric, goal)
    low, high = torch.zeros_like(full), full.clone()  # low fails (0 tokens show nothing), high reaches or is full
    low = torch.where(reached, low, full - 1)
    while bool((high - low > 1).any()):
        middle = torch.where(high - low > 1, (low + high) // 2, high)
        good = _reaches(tokenizer, dataclasses.replace(tokens, lengths=middle), images, metric, goal)
        open_ = high - low > 1
        high, low = torch.where(open_ & good, middle, high), torch.where(open_ & ~good, middle, low)
    return dataclasses.replace(tokens, lengths=high)[:, : int(high.max())], reached


def _reaches(tokenizer: Any, tokens: Tokens, images: Tensor, metric: Metric, goal: float) -> Tensor:
    noise: dict[str, Any] = {}
    if "generator" in tokenizer.options:
        noise["generator"] = torch.Generator(tokenizer.device).manual_seed(0)
    values = metric.update(tokenizer.decode(tokens, **noise).to(images.device), images).to(tokens.lengths.device)
    return values >= goal if metric.higher_is_better else values <= goal
