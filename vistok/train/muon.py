"""Muon: momentum made orthogonal, for the hidden matrices of a network (K. Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic a x + b x^3 + c x^5 that drives every singular value into about [0.7, 1.2] in five iterations."""


class Muon(torch.optim.Optimizer):
    """Muon for parameter groups with `matrices=True`, AdamW for the others.

    The update of a matrix is the polar factor of its Nesterov momentum, scaled by 0.2 * sqrt(max(rows, columns)), which
    gives it the root mean square of an AdamW update (arXiv 2502.16982), so that learning rates and decays of AdamW
    carry over. Matrices of one shape are orthogonalised as one batch.

    Args:
        params: Parameter groups; each says `matrices` and may have its own `lr` and `weight_decay`.
        lr: Learning rate.
        momentum: Decay of the momentum.
        betas: Of AdamW.
        eps: Of AdamW.
        iterations: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        iterations: int = 5,
    ) -> None:
        options = {"momentum": momentum, "betas": betas, "eps": eps, "iterations": iterations}
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "matrices": False, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; a closure is evaluated first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if group["matrices"]:
                self._muon(group, trained)
            elif trained:
                self._adamw(group, trained)
        return loss

    def _muon(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in trained:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            stacked = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
            updates = orthogonalise(stacked, group["iterations"])
            scale = 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-group["lr"] * scale)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)

    def _adamw(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        for parameter in trained:
            if not self.state[parameter]:
                zeros = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                self.state[parameter].update(zeros, step=torch.zeros(()))
        states = [self.state[p] for p in trained]
        first, second = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq"))
        gradients = [p.grad for p in trained]
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        torch._foreach_add_([s["step"] for s in states], 1)
        steps = [float(s["step"]) for s in states]
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(trained, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(trained, first, roots, [-lr / (1 - beta1**t) for t in steps])


def orthogonalise(x: Tensor, iterations: int = 5) -> Tensor:
    """Approximate polar factors U V^T of matrices (B, m, n), float32 on a CPU, bfloat16 elsewhere.

    Newton-Schulz with the quintic of `COEFFICIENTS`, on the side with fewer rows.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    y = y / (y.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for _ in range(iterations):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
