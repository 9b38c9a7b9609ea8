"""TexTok: a 1D tokenizer whose encoder and decoder both read a detailed caption (arXiv 2412.05796)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.image import Preprocess
from vistok.layers import local_start
from vistok.layers.attention import float32_linear
from vistok.layers.position import resize_table
from vistok.layers.transformer import Size, Transformer, initialise
from vistok.quantizers.base import Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.shape import check_1d, patch_grid
from vistok.tokenizers.text import ReadsText
from vistok.tokenizers.text_encoders import TextEncoder
from vistok.tokenizers.titok import SIZES, SizeName

T5_XL = TextEncoder(kind="t5", model="google/t5-v1_1-xl", length=32, dim=2048)
T5_XXL = TextEncoder(kind="t5", model="google/t5-v1_1-xxl", length=32, dim=4096)
Where = Literal["both", "encoder", "decoder", "none"]


class _TextPort(nn.Module):
    """A transformer over [image part; text], with one learnt position table for the whole sequence.

    Args:
        first: Tokens before the text.
        size: Shape of the transformer.
        text: Shape of the text features; None without text.
    """

    def __init__(self, first: int, size: Size, text: TextEncoder | None) -> None:
        super().__init__()
        self.text_proj = None if text is None else nn.Linear(text.dim, size.width)
        self.position = _table(first + (0 if text is None else text.length), size.width)
        self.transformer = Transformer(size.width, size.depth, size.heads)
        self.norm = nn.LayerNorm(size.width)

    def attend(self, x: Tensor, text: Tensor | None, rows: slice) -> Tensor:
        """Image part (B, N, D) and text features (B, L, text dim) -> the wanted rows, (B, rows, D)."""
        if self.text_proj is not None:
            assert text is not None
            x = torch.cat([x, self.text_proj(text.to(self.text_proj.weight.dtype))], dim=1)
        return self.norm(self.transformer(x + self.position, rows=rows))

    @torch.no_grad()
    def start_local(self, patches: int, tokens: int) -> None:
        """Patches and tokens find each other by place (`vistok.layers.local_start`); text has contents and no place."""
        self.position.zero_()
        self.position[: patches + tokens] = torch.cat(local_start.places(patches, tokens, self.position.shape[1]))
        local_start.attend_by_place(self.transformer)
        if self.text_proj is not None:
            local_start.write_content(self.text_proj)


class TexTokEncoder(_TextPort):
    """ViT over [patches, image tokens, text tokens] that keeps only the image tokens.

    Args:
        grid: Patches (h, w).
        patch_size: Side of a patch in pixels.
        num_tokens: Image tokens, K.
        size: Shape of the transformer.
        out_dim: Channels per token handed to the quantizer.
        text: Shape of the text features; None without text.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        num_tokens: int,
        size: Size,
        out_dim: int,
        text: TextEncoder | None,
    ) -> None:
        super().__init__(grid[0] * grid[1] + num_tokens, size, text)
        self.patches = grid[0] * grid[1]
        self.patch_embed = nn.Conv2d(3, size.width, patch_size, stride=patch_size)
        self.latents = _table(num_tokens, size.width)
        self.head = nn.Linear(size.width, out_dim)

    def forward(self, images: Tensor, text: Tensor | None) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W), and text features -> features (B, K, out_dim), float32."""
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)  # (B, h * w, D)
        latents = self.latents.to(x.dtype).expand(len(x), -1, -1)
        rows = slice(self.patches, self.patches + self.latents.shape[0])
        return float32_linear(self.attend(torch.cat([x, latents], dim=1), text, rows), self.head)


class TexTokDecoder(_TextPort):
    """ViT over [patch tokens, image tokens, text tokens] that keeps only the patch tokens, each a vector of its own.

    Args:
        grid: Patches (h, w).
        patch_size: Side of a patch in pixels.
        num_tokens: Image tokens, K.
        size: Shape of the transformer.
        in_dim: Channels of a code.
        text: Shape of the text features; None without text.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: int,
        num_tokens: int,
        size: Size,
        in_dim: int,
        text: TextEncoder | None,
    ) -> None:
        super().__init__(grid[0] * grid[1] + num_tokens, size, text)
        self.grid, self.patch_size = grid, patch_size
        self.patch_tokens = _table(grid[0] * grid[1], size.width)
        self.embed = nn.Linear(in_dim, size.width)
        self.to_patch = nn.Linear(size.width, patch_size * patch_size * 3)

    def forward(self, codes: Tensor, text: Tensor | None) -> Tensor:
        """Codes (B, K, in_dim) and text features -> pictures (B, 3, H, W)."""
        x = self.embed(codes.to(self.embed.weight.dtype))
        patches = self.patch_tokens.to(x.dtype).expand(len(x), -1, -1)
        x = self.attend(torch.cat([patches, x], dim=1), text, slice(0, self.patch_tokens.shape[0]))  # (B, h * w, D)
        p = self.patch_size
        x = self.to_patch(x).unflatten(2, (p, p, 3)).unflatten(1, self.grid)  # (B, h, w, p, p, 3)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, 3, h * p, w * p)


@register("tokenizer", "textok")
class TexTok(ReadsText, Tokenizer):
    """Text-conditioned tokenizer: the caption carries the meaning, the K image tokens what it does not say.

    Neither code nor weights were published. From the paper and its project page: both transformers of ViT-Base shape,
    T5-XL features (T5-XXL at 512 px) through a projection of their own on each side, patch tokens with a vector per
    position in the decoder, a latent of 8 channels, about 176 M parameters (here 176.3 M with patches of 8 pixels).
    Ours, since the paper does not say: a Gaussian latent with a weak KL term, 32 text tokens, zeros for padding after
    T5, all positions taking part in attention, pictures in [0, 1], and the empty caption as the null text (trained with
    `train.step.caption_dropout`). Encoding and decoding want the same caption; one given to `encode` travels with the
    tokens.

    Args:
        image_size: Side in pixels, or (H, W); multiples of `patch_size`.
        patch_size: Side of a patch in pixels.
        num_tokens: Image tokens, K.
        encoder: Shape of the encoder, a size of TiTok or {width, depth, heads}.
        decoder: Shape of the decoder.
        quantizer: Any registered quantizer that needs no grid.
        text: Which side reads the caption; `none` is the paper's baseline.
        text_encoder: The frozen text encoder.
        start: Initialisation, `published` (TiTok's; the paper gives none) or `local` (ours, for short runs; see
            `vistok.layers.local_start`).

    Example:
        >>> tok = vistok.create("tokenizer", "textok_128")
        >>> tok.encode("dog.jpg", text="A brown dog with a red collar on a beach, seen from the side.")
    """

    options = frozenset({"text"})

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 8,
        num_tokens: int = 128,
        encoder: SizeName | Size = "base",
        decoder: SizeName | Size = "base",
        quantizer: Annotated[Spec, Of("quantizer")],
        text: Where = "both",
        text_encoder: TextEncoder = T5_XL,
        start: local_start.Start = "published",
    ) -> None:
        super().__init__()
        sides, grid = patch_grid(image_size, patch_size)
        self.num_tokens = num_tokens
        self.preprocess = Preprocess(size=sides)
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        check_1d(self.quantizer, num_tokens)
        spec = self.read_text_with(text_encoder)
        encode, decode = (SIZES[s] if isinstance(s, str) else s for s in (encoder, decoder))
        reads = {side: spec if text in (side, "both") else None for side in ("encoder", "decoder")}
        dims = self.quantizer.in_dim, self.quantizer.dim
        self.encoder = TexTokEncoder(grid, patch_size, num_tokens, encode, dims[0], reads["encoder"])
        self.decoder = TexTokDecoder(grid, patch_size, num_tokens, decode, dims[1], reads["decoder"])
        initialise(self.encoder, self.decoder)
        if start == "local":
            self._start_local()

    @torch.no_grad()
    def _start_local(self) -> None:
        encoder, decoder = self.encoder, self.decoder
        for side in (encoder, decoder):
            side.start_local(encoder.patches, self.num_tokens)
        encoder.latents.zero_()
        decoder.patch_tokens.zero_()
        local_start.embed_pixels(encoder.patch_embed)
        local_start.read_content(encoder.head)
        local_start.write_content(decoder.embed)
        local_start.draw_pixels(decoder.to_patch)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.to_patch.weight

    def encode_features(self, images: Tensor, *, text: tuple[str, ...] | Tensor | None = None) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W), and B captions or features -> (B, K, quantizer.in_dim), float32."""
        return self.encoder(images, self._features(self.encoder, text, images))

    def decode_codes(self, codes: Tensor, *, text: tuple[str, ...] | Tensor | None = None) -> Tensor:
        """Codes (B, K, quantizer.dim) and B captions or features -> pictures, unclamped, (B, 3, H, W)."""
        return self.decoder(codes, self._features(self.decoder, text, codes))

    def _features(self, side: _TextPort, text: tuple[str, ...] | Tensor | None, like: Tensor) -> Tensor | None:
        return None if side.text_proj is None else self.text_features(text, len(like), like.device)

    def _resized_state(self, other: Any) -> dict[str, Tensor]:
        state, old, new = self.state_dict(), self.decoder.grid, other.decoder.grid
        for key, rest in (("encoder.position", True), ("decoder.position", True), ("decoder.patch_tokens", False)):
            patches = old[0] * old[1]
            resized = resize_table(state[key][:patches], old, new)
            state[key] = torch.cat([resized, state[key][patches:]]) if rest else resized
        return state


def _table(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width) * 0.02)


_TINY = {"width": 64, "depth": 2, "heads": 2}
preset(
    "tokenizer",
    "textok_tiny",
    builder="textok",
    config={
        "image_size": 64,
        "patch_size": 8,
        "num_tokens": 16,
        "encoder": _TINY,
        "decoder": _TINY,
        "quantizer": {"name": "gaussian", "dim": 8},
        "text_encoder": {"kind": "words", "length": 8, "dim": 32},
    },
)
for _tokens in (32, 64, 128, 256):
    for _size, _encoder, _name in ((256, T5_XL, f"textok_{_tokens}"), (512, T5_XXL, f"textok_{_tokens}_512px")):
        preset(
            "tokenizer",
            _name,
            builder="textok",
            config={
                "image_size": _size,
                "num_tokens": _tokens,
                "quantizer": {"name": "gaussian", "dim": 8},
                "text_encoder": {
                    "kind": "t5",
                    "model": _encoder.model,
                    "length": _encoder.length,
                    "dim": _encoder.dim,
                },
            },
        )
