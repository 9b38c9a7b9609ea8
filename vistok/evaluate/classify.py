"""Two classifiers on fixed features: nearest neighbours and multinomial logistic regression. Deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Strengths of the L2 penalty to choose from, strong to weak."""
FOLD = 5
"""One training sample in so many is held out to choose the penalty."""
_QUERIES = 1024


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, *, classes: int, most: int = 20) -> Tensor:
    """Majority votes of the 1, 2, ... `most` nearest training samples by cosine similarity.

    Of classes with equally many votes the one whose voters are nearer, by the sum of their similarities, wins.

    Args:
        train: Features, (n, D).
        labels: Their classes, (n,), int64.
        test: Features, (q, D).
        classes: Number of classes.
        most: Largest number of neighbours; fewer if there are fewer training samples.

    Returns:
        Classes, (min(most, n), q), int64: row k - 1 has the votes of k neighbours.
    """
    keys, most = F.normalize(train.double(), dim=1), min(most, len(train))
    found = []
    for queries in test.split(_QUERIES):
        similarity, index = (F.normalize(queries.double(), dim=1) @ keys.T).topk(most)  # (q, most)
        votes = F.one_hot(labels[index], classes).double()  # (q, most, classes)
        # `most` similarities lie in [-most, most], so their part of a score never outweighs a vote
        score = (votes * (1.0 + similarity / (2.5 * most)).unsqueeze(-1)).cumsum(1)
        found.append(score.argmax(-1).T)
    return torch.cat(found, 1)


@dataclass(frozen=True)
class LinearClassifier:
    """Multinomial logistic regression on standardised features.

    Attributes:
        mean: Of the training features, (D,).
        scale: Their standard deviations, 1 where a feature is constant.
        weight: (D, classes).
        bias: (classes,).
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features (n, D) -> classes (n,), int64."""
        return (((features.double() - self.mean) / self.scale) @ self.weight + self.bias).argmax(1)


def fit_linear(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    penalty: float,
    start: LinearClassifier | None = None,
    steps: int = 500,
) -> LinearClassifier:
    """Minimise mean cross-entropy + penalty / 2 |weight|^2 by full-batch L-BFGS with line search, in float64.

    Args:
        features: (n, D).
        labels: (n,), int64.
        classes: Number of classes.
        penalty: Strength of the L2 penalty; the bias has none.
        start: Where to begin; the problem is convex, so this only saves time.
        steps: Most iterations; it stops before if no gradient exceeds 1e-6.
    """
    x = features.double()
    mean, scale = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(scale > 1e-7 * (1.0 + mean.abs()), scale, 1.0)
    x = (x - mean) / scale
    weight = start.weight.clone() if start else x.new_zeros(x.shape[1], classes)
    bias = start.bias.clone() if start else x.new_zeros(classes)
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=steps,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return LinearClassifier(mean, scale, weight.detach(), bias.detach())


def choose_penalty(
    features: Tensor, labels: Tensor, *, classes: int, penalties: Sequence[float] = PENALTIES
) -> tuple[float, dict[float, float]]:
    """The penalty that does best on a fifth of the training samples; of equals the strongest.

    Every fifth sample is held out, which is a fair share of each class if samples are sorted by class.

    Returns:
        The penalty, and the accuracy on the fifth by penalty.
    """
    held = torch.arange(len(labels), device=labels.device) % FOLD == FOLD - 1
    fitted, accuracy = None, {}
    for penalty in sorted(penalties, reverse=True):
        fitted = fit_linear(features[~held], labels[~held], classes=classes, penalty=penalty, start=fitted)
        accuracy[penalty] = float((fitted(features[held]) == labels[held]).double().mean())
    return max(accuracy, key=lambda p: (accuracy[p], p)), accuracy
