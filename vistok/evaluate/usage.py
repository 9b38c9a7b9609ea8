"""How a tokenizer uses its ids over an evaluation set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.evaluate.metric import add_up

LARGEST_VOCABULARY = 2**24


class CodebookUsage:
    """Counts ids over an evaluation set.

    Which share of a vocabulary can be seen depends on how many ids were looked at, so `tokens` stands beside every
    figure.

    Args:
        vocab: Number of ids of each group, as in `Tokens.vocab`.

    Raises:
        ValueError: No groups (continuous latents have no ids), or a vocabulary too large to be counted.
    """

    def __init__(self, vocab: tuple[int, ...]) -> None:
        if not vocab or max(vocab) > LARGEST_VOCABULARY:
            raise ValueError(
                f"Code usage counts ids of vocabularies up to {LARGEST_VOCABULARY} each, got {vocab}. Continuous "
                f"latents have none; binary tokens are counted in byte groups."
            )
        self.vocab = vocab
        self.counts = [torch.zeros(v, dtype=torch.int64) for v in vocab]
        self.pictures = torch.zeros((), dtype=torch.int64)

    def update(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Enter the ids of a batch.

        Args:
            ids: (B, N) or (B, N, G) int64.
            mask: True where a position counts, (B, N).

        Raises:
            ValueError: Another number of groups than `vocab` says, or ids outside it.
        """
        rows = ids.detach().cpu().unsqueeze(-1) if ids.ndim == 2 else ids.detach().cpu()
        if rows.shape[-1] != len(self.vocab):
            raise ValueError(f"Expected ids of {len(self.vocab)} groups, got {rows.shape[-1]} ({tuple(ids.shape)}).")
        rows = rows.flatten(0, 1) if mask is None else rows[mask.cpu()]  # (tokens, G)
        for group, counts in enumerate(self.counts):
            column = rows[:, group]
            if len(column) and not (int(column.min()) >= 0 and int(column.max()) < self.vocab[group]):
                raise ValueError(
                    f"Ids of group {group} lie in {int(column.min())}..{int(column.max())}, the vocabulary is "
                    f"0..{self.vocab[group] - 1}."
                )
            counts += torch.bincount(column, minlength=len(counts))
        self.pictures += len(ids)

    def gather(self) -> None:
        """Add up the counts of all processes. Call it once, after the last update, on every process."""
        for counts in (*self.counts, self.pictures):
            add_up(counts)

    def compute(self) -> dict[str, float]:
        """The figures; of several groups the mean over groups, entropy and bits their sum.

        Returns:
            `tokens` (positions seen), `tokens_per_picture`, `usage` (share of ids that occurred), `entropy` (bits per
            token, from the frequencies seen), `bits` (log2 of the vocabulary), `efficiency` (entropy / bits),
            `perplexity` (2 to the entropy of a group, mean over groups), `dead` (ids that never occurred).

        Raises:
            ValueError: Nothing was seen.
        """
        tokens = int(self.counts[0].sum())
        if not tokens:
            raise ValueError("No ids were seen: call update first.")
        entropies = [_entropy(c) for c in self.counts]
        bits = sum(math.log2(v) for v in self.vocab)
        groups = len(self.vocab)
        return {
            "tokens": tokens,
            "tokens_per_picture": tokens / max(int(self.pictures), 1),
            "usage": sum(float((c > 0).double().mean()) for c in self.counts) / groups,
            "dead": sum(int((c == 0).sum()) for c in self.counts),
            "entropy": sum(entropies),
            "bits": bits,
            "efficiency": sum(entropies) / bits if bits else 1.0,
            "perplexity": sum(2.0**e for e in entropies) / groups,
        }


def _entropy(counts: Tensor) -> float:
    """Entropy in bits of observed frequencies."""
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum()) + 0.0
