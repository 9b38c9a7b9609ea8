"""The Inception score, in the three ways in which published tables split the pictures."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vistok.distributed import all_objects
from vistok.evaluate.metric import add_up

Rule = Literal["whole", "torch_fidelity", "adm"]
RULES: dict[str, str] = {
    "whole": "all pictures at once",
    "torch_fidelity": "mean over 10 parts of the pictures in the order of RandomState(2020).permutation",
    "adm": "mean over parts of 5,000 consecutive pictures",
}
SPLITS, SEED, PART = 10, 2020, 5000


class InceptionScore:
    """exp of the mean KL divergence of p(class | picture) from p(class) (Salimans et al. 2016), from logits.

    Args:
        rule: `whole`: over all pictures (TiTok's evaluator). `torch_fidelity`, `adm`: see `RULES`; logits are then kept
            until the end, 4 kB a picture, and the score depends on the order of the pictures. With several processes
            the order is that of the pictures if picture i went to process i % P, as `evaluate` shares them out.

    Raises:
        ValueError: No such rule.
    """

    def __init__(self, rule: str) -> None:
        if rule not in RULES:
            raise ValueError(f"The Inception score is split by one of {', '.join(RULES)}, got {rule!r}.")
        self.rule = rule
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.likelihood = torch.zeros((), dtype=torch.float64)
        self.marginal = torch.zeros(1008, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)
        self.logits: list[Tensor] = []

    def update(self, logits: Tensor) -> None:
        """Enter the logits of a batch, (B, 1008)."""
        self.count += len(logits)
        if self.rule != "whole":
            self.logits.append(logits.float().cpu())
            return
        log_p = logits.double().log_softmax(1).cpu()
        self.likelihood += (log_p.exp() * log_p).sum()
        self.marginal += log_p.exp().sum(0)

    def gather(self) -> None:
        """Add up the state of all processes, or bring their pictures into one order."""
        if self.rule == "whole":
            for state in (self.likelihood, self.marginal, self.count):
                add_up(state)
            return
        parts = [torch.cat(part) if part else torch.zeros(0, 1008) for part in all_objects(self.logits)]
        places = torch.cat([torch.arange(len(part)) * len(parts) + rank for rank, part in enumerate(parts)])
        self.logits = [torch.cat(parts)[places.argsort()]]
        self.count = torch.tensor(float(len(places)), dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """`inception_score`; of several parts also `inception_score_std` over them."""
        n = int(self.count)
        if self.rule == "whole":
            marginal = self.marginal / n
            entropy = -(marginal * marginal.clamp_min(1e-300).log()).sum()
            return {"inception_score": float((self.likelihood / n + entropy).exp())}
        logits = torch.cat(self.logits).double()
        if self.rule == "torch_fidelity":
            splits = min(SPLITS, n)
            logits = logits[torch.from_numpy(np.random.RandomState(SEED).permutation(n))]
            parts = [logits[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
        else:
            parts = list(logits.split(PART))
        scores = torch.stack([_score(part) for part in parts])
        return {"inception_score": float(scores.mean()), "inception_score_std": float(scores.std(correction=0))}


def _score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return (p * (log_p - p.mean(0).log())).sum(1).mean().exp()
