"""Optimisers by name, each a typed set of arguments that builds itself for a module."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vistok.config import ConfigError, check_call
from vistok.registry import nearest
from vistok.train.schedule import Shape, lr_at

NO_DECAY = ("*norm*", "*bias*", "*embed*", "*position*", "*latent*", "*token*", "*gamma*", "*codebook*")
"""Names without weight decay: TiTok's rule in our spelling (its `embedding` covers position tables and code books)."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimiser takes.

    Attributes:
        lr: Peak learning rate.
        schedule: Shape after the warm-up.
        warmup: Steps of linear warm-up.
        final_lr: Learning rate at the end (cosine and linear).
        start: Step at which the schedule begins, for a part that joins later (a discriminator).
        clip: Largest norm of all gradients of the part together; null for none.
        lr_scale: Name patterns to factors of the learning rate; 0 does not move, but `train.freeze` is cheaper.
        no_decay: Name patterns without weight decay, besides everything with fewer than two dimensions.
    """

    lr: float
    schedule: Shape = "cosine"
    warmup: int = 0
    final_lr: float = 0.0
    start: int = 0
    clip: float | None = 1.0
    lr_scale: dict[str, float] = field(default_factory=dict)
    no_decay: tuple[str, ...] = NO_DECAY

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimiser for a module's trainable parameters.

        Raises:
            ValueError: Nothing to train, or an `lr_scale` pattern that fits no parameter.
        """
        raise NotImplementedError

    def lr_at(self, step: int, steps: int, spent: float) -> float:
        """Learning rate of a step before `lr_scale`; see `vistok.train.schedule.lr_at`."""
        return lr_at(
            max(step - self.start, 0),
            lr=self.lr,
            steps=max(steps - self.start, 1),
            warmup=self.warmup,
            final_lr=self.final_lr,
            shape=self.schedule,
            spent=spent,
        )

    def groups(
        self, parameters: Iterable[tuple[str, Tensor]], weight_decay: float, **extra: Any
    ) -> list[dict[str, Any]]:
        """Parameter groups by decay and learning-rate scale; `extra` goes into every group."""
        found: dict[tuple[bool, float], list[tuple[str, Tensor]]] = {}
        for name, parameter in parameters:
            scale = next((s for p, s in self.lr_scale.items() if fnmatch.fnmatch(name, p)), 1.0)
            decayed = parameter.ndim >= 2 and not matches(name, self.no_decay)
            found.setdefault((decayed, scale), []).append((name, parameter))
        return [
            {"params": named, "weight_decay": weight_decay * decayed, "lr": self.lr, "scale": scale, **extra}
            for (decayed, scale), named in sorted(found.items(), key=lambda item: item[0])
        ]

    def _named(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("Nothing is left to train: every parameter is frozen. Check train.freeze.")
        for pattern in self.lr_scale:
            if not any(fnmatch.fnmatch(name, pattern) for name, _ in module.named_parameters()):  # frozen ones as well
                raise ValueError(f"optim.lr_scale: no parameter is called {pattern!r}. {_examples(named)}")
        return named


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101), PyTorch's fused implementation.

    Attributes:
        betas: Decay of the two means.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, times the learning rate.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        groups = self.groups(self._named(module), self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon for hidden matrices, AdamW for the rest; see `vistok.train.muon`.

    Attributes:
        momentum: Of the matrices' gradients (Nesterov).
        weight_decay: Decoupled decay, times the learning rate.
        adamw_lr: Peak learning rate of everything that is not a hidden matrix; follows the same schedule.
        betas: Of AdamW.
        eps: Of AdamW.
        iterations: Newton-Schulz iterations.
        not_matrices: Name patterns of two-dimensional parameters that AdamW gets: tables, first and last layers.
    """

    lr: float = 2e-3
    momentum: float = 0.95
    weight_decay: float = 0.01
    adamw_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    iterations: int = 5
    not_matrices: tuple[str, ...] = (*NO_DECAY, "*head*", "*to_patch*", "*patch*", "*logits*")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        from vistok.train.muon import Muon as Algorithm

        named = self._named(module)
        hidden = [(n, p) for n, p in named if p.ndim == 2 and not matches(n, self.not_matrices)]
        taken = {n for n, _ in hidden}
        rest = [(n, p) for n, p in named if n not in taken]
        groups = self.groups(hidden, self.weight_decay, matrices=True)
        for group in self.groups(rest, self.weight_decay, matrices=False):
            group["scale"] *= self.adamw_lr / self.lr
            groups.append(group)
        options = {"momentum": self.momentum, "betas": self.betas, "eps": self.eps, "iterations": self.iterations}
        return Algorithm(groups, lr=self.lr, **options)


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon}


def check(spec: Any, path: str) -> Optimizer:
    """`{name: adamw, lr: 1e-4, ...}` as a checked optimiser.

    Raises:
        ConfigError: Unknown name or key, wrong type, missing key.
    """
    values = dict(spec)
    name = values.pop("name", None)
    if name not in OPTIMIZERS:
        raise ConfigError(f"{path}.name: no optimiser is called {name!r}. {nearest(str(name), OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    return kind(**check_call(kind, values, path=path, what=f"optimiser {name!r}"))


def name_of(optimizer: Optimizer) -> str:
    """The name an optimiser has in a recipe."""
    return next(name for name, kind in OPTIMIZERS.items() if type(optimizer) is kind)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name fits one of the shell patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def freeze(module: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    """Stop training the parameters and statistics whose names fit.

    Args:
        module: The model.
        patterns: Shell patterns over the names of its state, e.g. `encoder.*`.

    Returns:
        The submodules all of whose state is frozen. Keep them in evaluation mode, so that running statistics and
        moving code books stand still too.

    Raises:
        ValueError: A pattern that fits nothing.
    """
    state = module.state_dict(keep_vars=True)
    frozen: set[str] = set()
    for pattern in patterns:
        hit = [name for name in state if fnmatch.fnmatch(name, pattern)]
        if not hit:
            raise ValueError(f"train.freeze: no parameter is called {pattern!r}. {_examples(list(state.items()))}")
        frozen.update(hit)
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    still = []
    for prefix, part in module.named_modules():
        own = [name for name in state if name.startswith(f"{prefix}." if prefix else "")]
        if own and frozen.issuperset(own):
            still.append(part)
    return still


def _examples(named: list[tuple[str, Tensor]]) -> str:
    tops = sorted({name.split(".")[0] for name, _ in named})
    return f"Names look like {named[0][0]!r}; the first parts are {', '.join(tops)}. Patterns are like 'encoder.*'."
