"""Losses: what a reconstruction is held against.

The protocol. A loss of registry kind `loss` is a module called as `loss(reconstruction, target)` with two batches of
pictures in [0, 1], (B, 3, H, W), and returns one value per picture, (B,), float32, smaller is better, not weighted
and not averaged: the step object averages, weights and masks. The reconstruction may leave [0, 1] (a decoder's output
is not clamped in training). Gradients reach the reconstruction, and the target only if it asks for them.

Networks inside a loss are frozen (`FrozenLoss`): always in eval mode, no parameters, empty state dict. So a loss can
be an attribute of a step or of a model without entering its optimiser, EMA, checkpoint or gradient reduction, and it
still follows `.to(device)`.

Two more sorts of things are registered as `loss`, for steps that train a discriminator: discriminators (names end in
`_discriminator`, `vistok.losses.discriminators`) and losses on their logits (names end in `_gan`,
`vistok.losses.adversarial`).
"""

from __future__ import annotations

from vistok.losses.base import FrozenLoss, check_pair, freeze

__all__ = ["FrozenLoss", "check_pair", "freeze"]
