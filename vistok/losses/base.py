"""What all losses share: the check of their input, and networks that are used but never trained."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

L = TypeVar("L", bound="FrozenLoss")


def check_pair(reconstruction: Tensor, target: Tensor, *, least: int = 1) -> None:
    """Refuse two batches that cannot be compared.

    Args:
        reconstruction: Pictures, (B, 3, H, W).
        target: Pictures of the same shape.
        least: Shortest side that is allowed.

    Raises:
        ValueError: Different shapes, not (B, 3, H, W), not floating point, or too small.
    """
    shape, other = tuple(reconstruction.shape), tuple(target.shape)
    if len(shape) != 4 or shape[1] != 3 or shape != other:
        raise ValueError(f"Expected two batches of pictures (B, 3, H, W) of one shape, got {shape} and {other}.")
    if not (reconstruction.is_floating_point() and target.is_floating_point()):
        raise ValueError(
            f"Expected floating-point pictures in [0, 1], got {reconstruction.dtype} and {target.dtype}. "
            f"Divide uint8 pictures by 255."
        )
    if min(shape[2:]) < least:
        raise ValueError(f"Pictures of at least {least} x {least} pixels are needed here, got {shape[2]} x {shape[3]}.")


class FrozenLoss(nn.Module):
    """A loss with a network inside that nobody trains: eval mode for good, no parameters, empty state dict.

    Attributes:
        weights_sha256: Hash of the file its weights came from, None if it has none. Evaluation protocols name it.
    """

    weights_sha256: str | None = None

    def freeze(self: L) -> L:
        """Turn every parameter and buffer below into a buffer that is not saved. Call it once weights are loaded."""
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                del module._parameters[name]
                module.register_buffer(name, None if parameter is None else parameter.detach(), persistent=False)
            module._non_persistent_buffers_set.update(module._buffers)
        return self.eval()

    def train(self: L, mode: bool = True) -> L:
        """Stays in eval mode: the networks hold dropout and batch norm."""
        return super().train(False)
