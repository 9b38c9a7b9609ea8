"""MingTok: continuous latents to generate, causal semantic features to understand, pixels from the latter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistok.image import Preprocess
from vistok.layers.cache import KeyValueCache
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer, TokenizerOutput
from vistok.tokenizers.mingtok_net import (
    LatentRange,
    LowLevelEncoder,
    PixelDecoder,
    SemanticDecoder,
    Stack,
    resize_positions,
)
from vistok.tokenizers.shape import patch_grid
from vistok.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Widths of the frozen features that training predicts; with them the model has a mask vector and two heads.

    Attributes:
        low: Width of those the encoder predicts (DINOv2 in the report).
        semantic: Width of those the semantic decoder predicts (CLIP in the report).
    """

    low: int
    semantic: int


@register("tokenizer", "mingtok")
class MingTok(Tokenizer):
    """MingTok (arXiv 2510.06590): encoder -> latents -> causal semantic decoder -> pixel decoder. Nothing is quantised.

    Tokens hold the normalised latents of the patches, row by row. The encoder gives a class latent behind them, which
    nothing decodes: causal attention keeps it from the patches, and generation never makes it.

    `forward` is the training pass on masked pictures; `extras` holds `latents` (B, h * w + 1, C), `semantic`
    (B, h * w, D) and, with `targets`, `low` (B, h, w, targets.low) and `high` (B, h, w, targets.semantic).

    Args:
        image_size: Side in pixels, or (H, W); multiples of `patch_size`.
        patch_size: Side of a patch of the encoder.
        latent_dim: Channels of a latent; divides the widths of encoder and semantic decoder.
        encoder: Shape of the low-level encoder.
        semantic: Shape of the semantic decoder.
        pixels: Shape of the pixel decoder.
        pixel_patch: Side of its patches; divides `patch_size`.
        mean: Mean of the raw latents. The published values belong to the published encoder: measure after training.
        scale: Their standard deviation.
        targets: What training predicts besides pixels; None for a model that is not trained.

    Raises:
        ValueError: Sizes that do not fit together.

    Example:
        >>> tok = vistok.create("tokenizer", "mingtok_vision")
        >>> tok.encode("photo.jpg")
        Tokens(1 x 256 tokens, continuous, 32 channels, grid 16x16)
    """

    decoder_parts = ("semantic", "pixels", "low_head", "high_head")

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 512,
        patch_size: int = 32,
        latent_dim: int = 32,
        encoder: Stack,
        semantic: Stack,
        pixels: Stack,
        pixel_patch: int = 16,
        mean: float = 0.0,
        scale: float = 1.0,
        targets: Targets | None = None,
    ) -> None:
        super().__init__()
        size, grid = patch_grid(image_size, patch_size)
        if pixel_patch < 1 or patch_size % pixel_patch:
            raise ValueError(f"pixel_patch {pixel_patch} does not divide the patch size {patch_size}.")
        if encoder.width % latent_dim or semantic.width % latent_dim:
            raise ValueError(f"latent_dim {latent_dim} does not divide the widths {encoder.width}, {semantic.width}.")
        self.patch_size = patch_size
        self.preprocess = Preprocess(size=size)
        self.num_tokens = grid[0] * grid[1]
        self.quantizer = LatentRange(latent_dim, mean, scale)
        self.encoder = LowLevelEncoder(grid, patch_size, encoder, latent_dim, masked=targets is not None)
        self.semantic = SemanticDecoder(latent_dim, semantic)
        self.pixels = PixelDecoder(semantic.width, patch_size // pixel_patch, pixel_patch, pixels)
        self.targets = targets
        self.low_head = None if targets is None else _predictor(latent_dim, encoder.width, targets.low)
        self.high_head = None if targets is None else _predictor(semantic.width, semantic.width, targets.semantic)
        _initialise(self)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.pixels.head.weight

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the tokens of a picture of `size`."""
        return size[0] // self.patch_size, size[1] // self.patch_size

    def raw_latents(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pictures in [0, 1] -> latents of patches and class token as the encoder gives them, (B, h * w + 1, C)."""
        return self.encoder(2 * images - 1, mask)

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> raw latents of the patches, float32, (B, h * w, C)."""
        return self.raw_latents(images)[:, :-1].float()

    def expand(self, codes: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Normalised latents -> semantic features, what a language model reads.

        Args:
            codes: (B, n, C), in order.
            cache: For going on token by token: the same object in every call, new for every batch. Any number of
                tokens may follow any number; the features are those of one parallel pass.

        Returns:
            (B, n, D).
        """
        return self.semantic(self.quantizer.restore(codes), cache)

    def to_pixels(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Semantic features (B, h * w, D) -> pictures around [0, 1], (B, 3, H, W)."""
        return (self.pixels(features, grid or self.grid_for(self.preprocess.size)) + 1) / 2

    def decode_codes(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Normalised latents (B, h * w, C) -> pictures, unclamped, (B, 3, H, W)."""
        return self.to_pixels(self.expand(codes), grid)

    def _resized_state(self, other: Any) -> dict[str, Tensor]:
        state = self.state_dict()
        key = "encoder.position"
        state[key] = resize_positions(state[key], self.encoder.grid, other.encoder.grid)
        return state

    def forward(
        self, images: Tensor, *, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """The training pass; the reconstruction is not clamped.

        Args:
            images: Float in [0, 1], (B, 3, H, W).
            mask: True where a patch is hidden from the encoder, (B, h * w); none if None.
            generator: Not used; nothing is drawn here.
        """
        size = (images.shape[-2], images.shape[-1])
        grid = self.grid_for(size)
        raw = self.raw_latents(images, mask)
        quantized = self.quantizer(raw[:, :-1].float())
        features = self.semantic(raw)[:, :-1]  # the class latent last: what stands before does not see it
        extras = {"latents": raw, "semantic": features}
        if self.low_head is not None and self.high_head is not None:
            extras["low"] = self.low_head(raw[:, :-1]).unflatten(1, grid)
            extras["high"] = self.high_head(features).unflatten(1, grid)
        tokens = Tokens(ids=None, codes=quantized.codes, grid=grid, size=size)
        return TokenizerOutput(self.to_pixels(features, grid), tokens, quantized, extras)


def _predictor(width: int, hidden: int, out: int) -> nn.Sequential:
    """MLP head; its shape was not published."""
    return nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def _initialise(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


preset(
    "tokenizer",
    "mingtok_tiny",
    builder="mingtok",
    config={
        "image_size": 64,
        "patch_size": 16,
        "latent_dim": 8,
        "encoder": {"width": 64, "depth": 2},
        "semantic": {"width": 64, "depth": 2},
        "pixels": {"width": 64, "depth": 2},
        "pixel_patch": 8,
    },
)
