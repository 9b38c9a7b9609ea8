"""MingTok's training: masked pictures, from which features of two frozen networks and all pixels are predicted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.data.base import Batch
from vistok.registry import register
from vistok.train.steps.base import Losses, Part, Step


@register("step", "mingtok")
class MaskedFeatures(Step):
    """Three objectives of one masked-picture task (arXiv 2510.06590, section 3; no code, no numbers published).

    Patches are hidden at the encoder's input. `low`: latents at hidden places predict a frozen vision network's
    features there (DINOv2 in the report). `semantic`: causal features at hidden places predict those of a network
    aligned with text (CLIP). `pixels`: mean absolute error of the picture from hidden and seen patches; `pixels_full`:
    the same without hiding anything. Weights are the recipe's `losses`; the share of hidden patches, all weights and
    the teachers' sizes were not published. Features are compared by their cosine. Hidden patches are keyed by (seed,
    step, sample).

    Args:
        low: Frozen network of `low`, e.g. `{name: repa, teacher: large}`.
        semantic: Frozen network of `semantic`, e.g. `{name: clip_patches}`.
        hidden: Share of patches that are hidden.
        kept_only: Average `pixels` over seen patches alone, as the released loss does when it is given a mask; over the
            whole picture, as the report says, if not.
    """

    own_losses: ClassVar[tuple[str, ...]] = ("low", "semantic", "pixels", "pixels_full")

    def __init__(
        self,
        *,
        low: Annotated[Spec, Of("loss")],
        semantic: Annotated[Spec, Of("loss")],
        hidden: float = 0.5,
        kept_only: bool = False,
    ) -> None:
        if not 0 < hidden < 1:
            raise ValueError(f"train.step.hidden is a share between 0 and 1, got {hidden}.")
        self.specs, self.hidden, self.kept_only = {"low": low, "semantic": semantic}, hidden, kept_only

    def setup(self, model: nn.Module, losses: Losses) -> None:
        """Take a MingTok and the losses on its full reconstruction, and build the frozen networks.

        Raises:
            ValueError: Another kind of model, or heads of another width than the networks' features.
        """
        super().setup(model, losses)
        targets: Any = getattr(model, "targets", None)
        if targets is None:
            raise ValueError(f"Step 'mingtok' trains a mingtok with targets, got {type(model).__name__} without.")
        for name, spec in self.specs.items():
            teacher, width = create("loss", **spec), getattr(targets, name)
            if teacher.width != width:
                raise ValueError(
                    f"{name!r} has {teacher.width} channels and model.targets.{name} is {width}: make them equal."
                )
            self.helpers[name] = teacher

    def run(self, batch: Batch, step: int, generator: torch.Generator) -> Iterator[Part]:
        """One part, `model`: a masked and an unmasked pass as one batch. See `Step.run`."""
        images, losses = batch.images, self.helpers["losses"]
        model: Any = self.trained["model"]
        grid = self._grid(images)
        mask = hide(batch.uniform("hidden", grid[0] * grid[1]), self.hidden)
        both = torch.cat([mask, torch.zeros_like(mask)])
        out = model(images.repeat(2, 1, 1, 1), mask=both, generator=generator)
        masked, full = out.images.float().chunk(2)
        terms: dict[str, Tensor] = {
            "pixels": kept_l1(masked, images, mask if self.kept_only else None, grid),
            "pixels_full": kept_l1(full, images, None, grid),
        }
        for name, found in (("low", out.extras["low"]), ("semantic", out.extras["high"])):
            terms[name] = at_places(found.chunk(2)[0], self.helpers[name].features(images), mask)  # type: ignore[operator]
        terms |= losses(full, images, step)
        weights = {name: losses.weight(name, step) for name in terms}  # type: ignore[operator]
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        yield Part("model", total, terms, {}, weights)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        model: Any = self.trained["model"]
        bare = getattr(model, "module", model)  # behind a data-parallel wrapper
        grid: tuple[int, int] = bare.grid_for((images.shape[-2], images.shape[-1]))
        return grid


def hide(uniform: Tensor, share: float) -> Tensor:
    """True at the places that are hidden: the rounded share with the smallest numbers, (B, N) -> bool (B, N)."""
    count = min(max(round(share * uniform.shape[1]), 1), uniform.shape[1] - 1)
    return uniform.argsort(1).argsort(1) < count


def kept_l1(reconstruction: Tensor, target: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Mean absolute error over the patches that are seen, all without a mask; half of the official one, in [-1, 1].

    Args:
        reconstruction: (B, 3, H, W).
        target: (B, 3, H, W).
        mask: True where a patch is hidden, (B, h * w).
        grid: (h, w).
    """
    error = (reconstruction.float() - target).abs()
    if mask is None:
        return error.mean()
    seen = (~mask).unflatten(1, grid)[:, None].to(error.dtype)  # (B, 1, h, w)
    weights = F.interpolate(seen, size=error.shape[-2:], mode="nearest").expand_as(error)
    return (error * weights).sum() / weights.sum()


def at_places(found: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Minus the mean cosine at hidden places.

    Args:
        found: Predicted features, (B, h, w, D).
        wanted: Features of the frozen network, (B, h', w', D), resized to (h, w).
        mask: True at hidden places, (B, h * w).
    """
    target = wanted.permute(0, 3, 1, 2).float()
    if target.shape[-2:] != found.shape[1:3]:
        target = F.interpolate(target, size=found.shape[1:3], mode="bilinear", antialias=True)
    cosine = F.cosine_similarity(found.float(), target.permute(0, 2, 3, 1), dim=-1).flatten(1)
    return -cosine[mask].mean()
