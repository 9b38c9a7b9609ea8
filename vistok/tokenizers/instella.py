"""Instella's tokenizer: a picture of up to 1024 pixels as 128 1D tokens of 64 bits."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.image import Preprocess
from vistok.layers.conv import pad_to_multiple
from vistok.quantizers.base import Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer, TokenizerOutput
from vistok.tokenizers.instella_net import InstellaDecoder, InstellaEncoder, Size
from vistok.tokenizers.shape import check_1d


@register("tokenizer", "instella")
class Instella(Tokenizer):
    """The 1D binary auto-encoder of Instella-T2I (arXiv 2506.21022): the same number of tokens for every size.

    Positions are spread over the same range whatever the picture's size (`scale`), so one model takes 256 to 1024
    pixels, and tokens of one size decode to another (`decode(tokens, size=(1024, 1024))`). Sides that are no multiple
    of two patches are padded, and cropped back. Picture files are cropped to `image_size`.

    `forward` gives, with `repa_dim`, `extras["repa"]` (B, h, w, repa_dim): projected picture tokens of the decoder
    before the change of resolution. The training script and its loss weights were never released.

    Released code rounds positions to the weights' precision and has no answer for a side of one token (0 / 0); here
    positions are float32, and 0 there.

    Args:
        image_size: Side in pixels, or (H, W), that picture files are cropped to.
        patch_size: Side of a patch in pixels.
        num_tokens: Latent tokens, K.
        encoder: Shape of the encoder; its picture tokens are halved in each direction behind block `resize_after`.
        decoder: Shape of the decoder; its picture tokens are doubled there.
        quantizer: Any registered quantizer for 1D tokens; the published one is `binary` with 64 bits.
        axes: Channels of a head that encode the place of a latent token, the row and the column.
        scale: Pixels whose patches span the range of positions, 1024 in the released scripts; None counts patches.
        repa_dim: Width of a REPA teacher; None for no projector (it is used in training alone).

    Example:
        >>> tok = vistok.create("tokenizer", "instella_1024.laion")
        >>> tok.encode(torch.rand(1, 3, 512, 768)).ids.shape
        torch.Size([1, 128, 8])
    """

    options = frozenset({"size"})

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 1024,
        patch_size: int = 16,
        num_tokens: int = 128,
        encoder: Size = Size(12, 12),  # noqa: B008  # frozen
        decoder: Size = Size(16, 16),  # noqa: B008
        quantizer: Annotated[Spec, Of("quantizer")],
        axes: tuple[int, int, int] = (8, 28, 28),
        scale: int | None = 1024,
        repa_dim: int | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1 or num_tokens < 1 or (scale is not None and scale < 4 * patch_size):
            raise ValueError(
                f"patch_size and num_tokens are at least 1 and scale at least four patches, got {patch_size}, "
                f"{num_tokens} and {scale}."
            )
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.preprocess = Preprocess(size=size)
        self.patch_size, self.num_tokens, self.scale, self.repa_dim = patch_size, num_tokens, scale, repa_dim
        self.multiple = 2 * patch_size
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        check_1d(self.quantizer, num_tokens)
        shapes = [s if isinstance(s, Size) else Size(**s) for s in (encoder, decoder)]
        self.encoder = InstellaEncoder(shapes[0], patch_size, num_tokens, self.quantizer.in_dim, axes)
        self.decoder = InstellaDecoder(shapes[1], patch_size, self.quantizer.dim, axes, repa_dim)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.to_patch.weight

    @property
    def span(self) -> int | None:
        """Range of positions of a side, in patches; None to count them."""
        return None if self.scale is None else self.scale // self.patch_size

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, K, quantizer.in_dim), float32."""
        return self.encoder(pad_to_multiple(images, 2 * self.patch_size), self.span)

    def decode_codes(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
        """Codes (B, K, quantizer.dim) -> pictures of `size` with its sides rounded up, unclamped, (B, 3, H, W)."""
        return self._decode(codes, size or self.preprocess.size)[0]

    def _decode(self, codes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        step = 2 * self.patch_size
        h, w = (2 * -(-side // step) for side in size)
        pictures, inner = self.decoder(codes, (h, w), self.span)
        return pictures, inner

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> TokenizerOutput:
        """As `Tokenizer.forward`, with `extras["repa"]` where there is a projector.

        Args:
            images: Float in [0, 1], (B, 3, H, W).
            generator: Source of every random draw.
        """
        size = (images.shape[-2], images.shape[-1])
        tokens, quantized = self.tokenize(images, generator=generator)
        pictures, inner = self._decode(quantized.codes, size)
        extras = {} if self.decoder.repa is None else {"repa": self.decoder.repa(inner)}
        rebuilt = self._cropped(pictures, size)
        return TokenizerOutput(images=rebuilt, tokens=tokens, quantized=quantized, extras=extras)


preset(
    "tokenizer",
    "instella_tiny",
    builder="instella",
    config={
        "image_size": 64,
        "patch_size": 8,
        "num_tokens": 16,
        "encoder": {"depth": 2, "heads": 2, "head_dim": 32, "resize_after": 0},
        "decoder": {"depth": 2, "heads": 2, "head_dim": 32, "resize_after": 0},
        "axes": (8, 12, 12),
        "scale": 128,
        "quantizer": {"name": "binary", "dim": 64, "num_bits": 16},
    },
)
