"""Frozen image encoders whose embedding a tokenizer learns to predict (the target of SEED's de-tokenizer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.losses.base import freeze
from vistok.losses.perceptual import Lpips
from vistok.registry import register

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEmbedding(nn.Module):
    """Pictures in [0, 1], (B, 3, H, W) -> an embedding of each, float32, (B, `dim`); frozen."""

    dim: int

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        raise NotImplementedError


@register("loss", "clip_embedding")
class ClipEmbedding(ImageEmbedding):
    """The projected image embedding of a CLIP model of open_clip, not normalised.

    SEED-2 predicts that of ViT-H/14 (`laion/CLIP-ViT-H-14-laion2B-s32B-b79K`) for the same picture of 224 pixels;
    pictures of another size are resized bicubically to the tower's.

    Args:
        model: A name of open_clip, `hf-hub:org/name` or `local-dir:FOLDER`.
        pretrained: With a name: open_clip's tag or a weight file.

    Raises:
        ValueError: A name without `pretrained`, whose weights would be random.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, model: str, pretrained: str | None = None) -> None:
        super().__init__()
        import open_clip

        if ":" not in model and pretrained is None:
            raise ValueError(
                f"clip_embedding: {model!r} without weights is a random target. Give pretrained=TAG or FILE, or "
                "model=hf-hub:org/name or local-dir:FOLDER."
            )
        clip = open_clip.create_model(model, pretrained=pretrained)
        self.visual: nn.Module = clip.visual
        self.dim = int(clip.visual.output_dim)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1))
        freeze(self)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, dim), float32."""
        size: tuple[int, int] = self.visual.image_size  # type: ignore[assignment]
        if tuple(images.shape[-2:]) != tuple(size):
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.visual((images - self.mean) / self.std).float()


@register("loss", "alexnet_embedding")
class AlexNetEmbedding(ImageEmbedding):
    """Mean over positions of AlexNet's last convolution, standardised over channels: a target that works offline.

    The weights are those of LPIPS, which come with the package. For small recipes and tests; nobody published with it.
    """

    dim = 256

    def __init__(self) -> None:
        super().__init__()
        self.network = Lpips(net="alex")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) with H, W of at least 32 -> (B, 256), float32."""
        *_, last = self.network.features(images)
        return F.layer_norm(last.float().mean((2, 3)), (self.dim,))
