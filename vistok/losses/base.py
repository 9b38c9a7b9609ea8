"""What all losses share: the check of their input, and networks that are used but never trained."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

L = TypeVar("L", bound="FrozenLoss")
M = TypeVar("M", bound=nn.Module)


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


def freeze(module: M) -> M:
    """Turn every parameter and buffer of a module into a buffer that is not saved; returns it in eval mode.

    Call it once the weights are loaded.
    """
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            part.register_buffer(name, None if parameter is None else parameter.detach(), persistent=False)
        part._non_persistent_buffers_set.update(part._buffers)
    return module.eval()


class FrozenLoss(nn.Module):
    """A loss with a network inside that nobody trains: eval mode for good, no parameters, empty state dict.

    A subclass ends its constructor with `freeze(self)`.

    Attributes:
        weights_sha256: Hash of the file its weights came from, None if it has none. Evaluation protocols name it.
    """

    weights_sha256: str | None = None

    def train(self: L, mode: bool = True) -> L:
        """Stays in eval mode: the networks hold dropout and batch norm."""
        return super().train(False)
