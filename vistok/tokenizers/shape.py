"""What tokenizers check when they are built."""

from __future__ import annotations

from vistok.quantizers.base import Quantizer

Sides = tuple[int, int]


def patch_grid(image_size: int | Sides, patch_size: int) -> tuple[Sides, Sides]:
    """(H, W) of pictures and (h, w) of their patches.

    Raises:
        ValueError: Sides that are no multiple of the patch.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if patch_size < 1 or min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"image_size {height}x{width} is not a multiple of the patch size {patch_size}.")
    return (height, width), (height // patch_size, width // patch_size)


def check_1d(quantizer: Quantizer, num_tokens: int) -> None:
    """Whether a quantizer takes `num_tokens` features that lie on no grid.

    Raises:
        ValueError: Fewer than one token, or a quantizer that needs a grid.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is at least 1, got {num_tokens}.")
    try:
        fits = quantizer.num_ids(num_tokens) == num_tokens
    except ValueError:  # no grid at all is what is wrong, not its shape
        fits = False
    if not fits:
        raise ValueError(
            f"The quantizer {quantizer.registry_name!r} needs a grid of features; 1D tokens have none. Choose another."
        )
