"""TA-TiTok: single-stage TiTok whose decoder reads the picture's caption (arXiv 2501.07730)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec
from vistok.layers.local_start import Start, write_content
from vistok.layers.transformer import Size, initialise
from vistok.registry import preset, register
from vistok.tokenizers.text import ReadsText
from vistok.tokenizers.text_encoders import TextEncoder
from vistok.tokenizers.titok import PixelHead, SizeName, TiTokBase, TiTokDecoder

CLIP = TextEncoder(kind="clip", model="ViT-L-14-336", pretrained="openai", length=77, dim=768)


class TATiTokDecoder(TiTokDecoder):
    """TiTok's decoder over [class, mask tokens, latent tokens, text tokens].

    Padding of a caption takes part in attention, as in the official code.

    Args:
        grid: Patches (h, w).
        num_tokens: Latent tokens, K.
        size: Shape of the transformer.
        in_dim: Channels of a code.
        text: Shape of the text features.
    """

    def __init__(self, grid: tuple[int, int], num_tokens: int, size: Size, in_dim: int, text: TextEncoder) -> None:
        super().__init__(grid, num_tokens, size, in_dim)
        self.text_proj = nn.Linear(text.dim, size.width)
        self.text_position = nn.Parameter(torch.randn(text.length, size.width) * size.width**-0.5)

    def forward(self, codes: Tensor, context: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, K, in_dim) and text features (B, L, text dim) as `context` -> patch features (B, h * w, D)."""
        if context is not None:
            context = self.text_proj(context.to(self.text_proj.weight.dtype)) + self.text_position
        return super().forward(codes, context, lengths)

    @torch.no_grad()
    def start_local(self) -> None:
        """As TiTok's; the text has contents, and no place."""
        super().start_local()
        write_content(self.text_proj)
        self.text_position.zero_()


@register("tokenizer", "ta_titok")
class TATiTok(ReadsText, TiTokBase):
    """Text-aware TiTok: K 1D tokens of a picture, decoded with the help of its caption.

    Encoder and quantizer are those of `titok`; the decoder's sequence has the features of a frozen text encoder at its
    end (CLIP ViT-L/14-336 without pooling, 77 x 768, in the published models). Encoding needs no text; captions given
    there travel with the tokens to `decode`, also in `.vtok` files. Without a caption the empty one is used. A caption
    can paint what the tokens do not hold: judge reconstructions with the empty one too.

    Args:
        image_size: Side in pixels, or (H, W); multiples of `patch_size`.
        patch_size: Side of a patch in pixels.
        num_tokens: Latent tokens, K.
        encoder: Shape of the encoder, a published size or {width, depth, heads}.
        decoder: Shape of the decoder.
        quantizer: Any registered quantizer that needs no grid.
        text_encoder: The frozen text encoder.
        start: Initialisation, `published` or `local` (ours, for short runs; see `vistok.layers.local_start`).

    Example:
        >>> tok = vistok.load("ta_titok_sl128_vae.datacomp")
        >>> tok.decode(tok.encode("dog.jpg", text="A photo of a dog."))
    """

    options = frozenset({"text"})
    decoder_parts = ("decoder", "head")
    decoder: TATiTokDecoder

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_tokens: int = 128,
        encoder: SizeName | Size = "base",
        decoder: SizeName | Size = "large",
        quantizer: Annotated[Spec, Of("quantizer")],
        text_encoder: TextEncoder = CLIP,
        start: Start = "published",
    ) -> None:
        super().__init__()
        size = self._build(image_size, patch_size, num_tokens, quantizer, (encoder, decoder), legacy=False)
        spec = self.read_text_with(text_encoder)
        self.decoder = TATiTokDecoder(self.decoder.grid, num_tokens, size, self.quantizer.dim, spec)
        self.head = PixelHead(size.width, patch_size)
        initialise(self.encoder)  # the official decoder is built after that pass and keeps PyTorch's defaults
        self._start(start)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.head.smooth.weight

    def encode_features(self, images: Tensor, *, text: tuple[str, ...] | Tensor | None = None) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, K, quantizer.in_dim), float32; the text is not looked at."""
        return self.encoder(images)

    def decode_codes(self, codes: Tensor, *, text: tuple[str, ...] | Tensor | None = None) -> Tensor:
        """Codes (B, K, quantizer.dim) and B captions or features -> pictures, unclamped, (B, 3, H, W)."""
        features = self.text_features(text, len(codes), codes.device)
        return self.head(self.decoder(codes, features), self.decoder.grid)


_TINY = {"width": 64, "depth": 2, "heads": 2}
preset(
    "tokenizer",
    "ta_titok_tiny",
    builder="ta_titok",
    config={
        "image_size": 64,
        "patch_size": 8,
        "num_tokens": 16,
        "encoder": _TINY,
        "decoder": _TINY,
        "quantizer": {"name": "vq", "codebook_size": 256, "dim": 8, "l2_norm": True},
        "text_encoder": {"kind": "words", "length": 8, "dim": 32},
    },
)
