"""CDPruner: diverse tokens that have to do with the question."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.compress.budget import Budget
from vistok.compress.greedy import determinantal, unit
from vistok.compress.method import FeatureMethod, selection
from vistok.compress.reduction import Reduction
from vistok.compress.signals import Signals
from vistok.registry import register


def clip_relevance(pictures: Tensor, text: Tensor, *, batch_wide: bool = False) -> Tensor:
    """Relevance as published, for `greedy.determinantal`: mean *negative* cosine, scaled to [0, 1].

    The authors rely on CLIP's similarity of patches and text being inverted in practice.

    Args:
        pictures: Image tokens behind CLIP's visual projection, (B, N, E).
        text: The question behind its text projection, one row per segment of 77 tokens, (S, E) or (B, S, E).
        batch_wide: Scale over the whole batch, as the released code does, so that results depend on the batch.

    Returns:
        (B, N).
    """
    return _scaled(-(unit(pictures) @ unit(text).transpose(-1, -2)).mean(-1), batch_wide=batch_wide)


def _scaled(values: Tensor, *, batch_wide: bool = False) -> Tensor:
    dims = (0, 1) if batch_wide else (1,)
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    return (values - low + 1e-6) / (high - low).clamp_min(1e-6)


@register("method", "cdpruner")
class CDPruner(FeatureMethod):
    """Greedy mode of a determinantal point process, conditioned on relevance (arXiv 2506.10967, NeurIPS 2025).

    The published relevance needs the CLIP text tower that belongs to the vision tower, which host models do not carry
    (`clip_relevance` computes it from outside). Here a token is as relevant as its projected feature is similar, on
    average, to the embeddings of the prompt's text in the language model: that works on every host, but is not the
    published score, so there is no `reference`. Without text all tokens are equally relevant.

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. 64 is a setting of the paper for 576.
    """

    needs = frozenset({"text"})
    per_crop = True

    def __init__(self, *, keep: int | float | Budget = 64) -> None:
        super().__init__(keep=keep)

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """The `count` tokens of the greedy mode."""
        assert count is not None
        x = signals.features.unsqueeze(0)
        relevance = torch.ones(1, signals.length, device=x.device)
        if signals.text is not None and len(signals.text):
            words = unit(signals.text.to(x.device)).mean(0)
            relevance = _scaled(unit(x) @ words)
        return selection(determinantal(x, relevance, count)[0], signals.length)
