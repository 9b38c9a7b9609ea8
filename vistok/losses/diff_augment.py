"""Differentiable augmentation of what a discriminator sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiffAugment(nn.Module):
    """DiffAugment (Zhao et al., arXiv 2006.10738): translation, colour and cutout that gradients pass through.

    Originals and reconstructions pass it in calls, and so with draws, of their own. Only in training. As in the paper:
    shifts up to an eighth of the side with zeros behind, brightness +-0.5, saturation times 0 to 2, contrast times 0.5
    to 1.5, all on values in [-1, 1]. The paper cuts out half of the side, GigaTok a fifth, which is the
    default here; like them this draws for each group of operations whether it is applied, and they always apply all.

    Args:
        probability: Probability of each of translation, colour and cutout, drawn once per batch.
        cutout: Side of the square that is set to zero, over that of the picture.
    """

    def __init__(self, *, probability: float = 1.0, cutout: float = 0.2) -> None:
        super().__init__()
        self.probability, self.cutout = probability, cutout

    def forward(self, images: Tensor) -> Tensor:
        """Pictures around [-1, 1], (B, 3, H, W), augmented; unchanged outside training."""
        if not self.training or not self.probability:
            return images
        applied = torch.rand(3) < self.probability  # on the CPU: it decides what is run
        draws = torch.rand(7, len(images), device=images.device)
        if applied[0]:
            images = translate(images, draws[0], draws[1])
        if applied[1]:
            images = recolour(images, draws[2], draws[3], draws[4])
        return cut_out(images, draws[5], draws[6], self.cutout) if applied[2] else images


def translate(images: Tensor, down: Tensor, right: Tensor, share: float = 0.125) -> Tensor:
    """Shift every picture by whole pixels, zeros behind.

    Args:
        images: (B, 3, H, W).
        down: Numbers in [0, 1), (B,): from `share` of the height up to as much down.
        right: The same for the width.
        share: Largest shift over the side.
    """
    rows, inside_rows = _shifted(images.shape[-2], down, share)
    columns, inside_columns = _shifted(images.shape[-1], right, share)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    return moved.permute(0, 3, 1, 2) * inside[:, None]


def _shifted(side: int, draw: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Where each pixel along one side comes from, and whether that is inside the picture, both (B, side)."""
    most = round(side * share)
    shift = (draw * (2 * most + 1)).long() - most
    source = torch.arange(side, device=draw.device) - shift[:, None]
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def recolour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add -0.5 to 0.5, then scale saturation by 0 to 2 and contrast by 0.5 to 1.5; numbers in [0, 1), (B,) each."""
    one, two, three = (x[:, None, None, None].to(images.dtype) for x in (brightness, saturation, contrast))
    images = images + (one - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2.0 * two)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + (images - level) * (three + 0.5)


def cut_out(images: Tensor, down: Tensor, right: Tensor, share: float) -> Tensor:
    """Set a rectangle of `share` of the height and width to zero; its centre lies at (down, right), (B,) each."""
    masks = []
    for side, draw in ((images.shape[-2], down), (images.shape[-1], right)):
        size = round(side * share)
        first = (draw * (side + 1 - size % 2)).long() - size // 2
        at = torch.arange(side, device=draw.device) - first[:, None]
        masks.append((at >= 0) & (at < size))  # (B, side)
    hole = masks[0][:, None, :, None] & masks[1][:, None, None, :]
    return images.masked_fill(hole, 0.0)
