"""GigaTok: convolutions around a transformer around a code book, from 136 M to 2.9 B parameters (arXiv 2504.08736)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.image import Preprocess
from vistok.layers.attention import float32_linear
from vistok.layers.conv import to_map, to_sequence
from vistok.layers.local_start import Start
from vistok.layers.position import resize_table
from vistok.layers.transformer import Size, initialise
from vistok.layers.unet import PictureDecoder, PictureEncoder
from vistok.quantizers.base import Quantized, Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer, TokenizerOutput
from vistok.tokenizers.gigatok_net import Layer, MapToMap, MapToTokens, TokensToMap
from vistok.tokenizers.shape import check_1d

SIZES = {
    "tiny": Size(256, 4, 4),
    "small": Size(512, 6, 8),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "xl": Size(1280, 36, 20),
    "xxl": Size(1536, 48, 24),
    "xxxl": Size(2560, 48, 40),
}
SizeName = Literal["tiny", "small", "base", "large", "xl", "xxl", "xxxl"]


class GigaTokBase(Tokenizer):
    """What the 1D and the 2D variant share: convolutions, projections around the quantizer, the semantic tap.

    Attributes:
        encoder: Picture to map.
        to_tokens: Map to tokens; its `norm_post` is what GigaTok's linear probe looks at.
        quant_proj: Tokens to the quantizer's features.
        code_proj: Codes to tokens.
        to_map: Tokens to map.
        decoder: Map to picture.
        semantic: From the stream of `to_map` after layer `semantic_layer` to features of a vision model; training only.
    """

    decoder_parts = ("code_proj", "to_map", "decoder", "semantic")
    probe_point = "to_tokens.norm_post"
    to_tokens: nn.Module
    to_map: nn.Module

    def _build(
        self,
        image_size: int | tuple[int, int],
        num_tokens: int | None,
        sizes: Sequence[Any],
        quantizer: Spec,
        channels: tuple[int, tuple[int, ...], int, int],
    ) -> tuple[tuple[int, int], Size, Size]:
        """Set everything but the transformers; the map's (h, w) and the sizes of both transformers."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        base, multipliers, inner, groups = channels
        factor = 2 ** (len(multipliers) - 1)
        if min(height, width) < factor or height % factor or width % factor:
            raise ValueError(f"image_size {height}x{width} is not a multiple of {factor}.")
        if groups < 1 or base < groups or base % groups:
            raise ValueError(f"channels is a multiple of the {groups} groups of the norms, got {base}.")
        grid = (height // factor, width // factor)
        self.num_tokens = num_tokens or grid[0] * grid[1]
        self.preprocess = Preprocess(size=(height, width))
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        self.encoder = PictureEncoder(base, multipliers, inner, groups=groups)
        self.decoder = PictureDecoder(base, multipliers, inner, groups=groups)
        self.quant_proj = nn.Linear(inner, self.quantizer.in_dim)
        self.code_proj = nn.Linear(self.quantizer.dim, inner)
        encode, decode = (SIZES[s] if isinstance(s, str) else s for s in sizes)
        return grid, encode, decode

    def _add_semantic(self, size: Size, layer: int, dim: int | None) -> None:
        if dim is not None and not 1 <= layer <= size.depth:
            raise ValueError(f"semantic_layer is 1..{size.depth} for this decoder, got {layer}.")
        self.semantic_layer = layer
        self.semantic = None if dim is None else _mlp(size.width, dim)
        parts = [self.encoder, self.decoder, self.to_tokens, self.to_map]
        initialise(*parts, *([] if self.semantic is None else [self.semantic]))

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.conv_out.weight

    def _features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] -> the convolutional encoder's map, (B, channels, h, w)."""
        return self.encoder(2 * images - 1)

    def _quantizer_features(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _rebuilt_features(self, codes: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _pixels(self, features: Tensor) -> Tensor:
        return (self.decoder(features) + 1) / 2

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, K, quantizer.in_dim), float32."""
        return self._quantizer_features(self._features(images))

    def decode_codes(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes (B, K, quantizer.dim) -> pictures, unclamped, (B, 3, H, W)."""
        return self._pixels(self._rebuilt_features(codes)[0])

    def forward(
        self,
        images: Tensor,
        *,
        lengths: None = None,
        text: None = None,
        generator: torch.Generator | None = None,
        direct: bool = False,
    ) -> TokenizerOutput:
        """As `Tokenizer.forward`, with what GigaTok's losses compare.

        Args:
            images: Float in [0, 1], (B, 3, H, W).
            lengths: None, since it is not nested.
            text: None, since it reads none.
            generator: Source of every random draw.
            direct: Decode the convolutional encoder's map too, without transformers and quantizer.

        Returns:
            With extras `features` and `rebuilt_features` (B, channels, h, w), the map on its way in and out;
            `semantic` (B, h, w, semantic_dim); and, if asked for, `direct` (B, 3, H, W).
        """
        self._text_option(text, len(images))
        features = self._features(images)
        size = (images.shape[-2], images.shape[-1])
        grid = self.grid_for(size)
        quantized: Quantized = self.quantizer(self._quantizer_features(features), grid=grid, generator=generator)
        codes, _ = self._shortened(quantized.codes, lengths)
        rebuilt, tapped = self._rebuilt_features(codes, None if self.semantic is None else self.semantic_layer)
        extras = {"features": features, "rebuilt_features": rebuilt}
        if tapped is not None and self.semantic is not None:
            extras["semantic"] = self.semantic(tapped).unflatten(1, rebuilt.shape[-2:])
        if direct:
            extras["direct"] = self._pixels(features)
        tokens = self.tokens_of(quantized, size)
        return TokenizerOutput(images=self._pixels(rebuilt), tokens=tokens, quantized=quantized, extras=extras)

    def _resized_state(self, other: Any) -> dict[str, Tensor]:
        state = self.state_dict()
        for part in ("to_tokens", "to_map"):
            key, old, new = f"{part}.position", getattr(self, part).grid, getattr(other, part).grid
            state[key] = resize_table(state[key], old, new)
        return state


@register("tokenizer", "gigatok")
class GigaTok(GigaTokBase):
    """GigaTok with 1D tokens, the variant that scales.

    A convolutional encoder (f16) gives a map; queries averaged from it at many scales, coarse to fine, collect K tokens
    in a transformer; a decoder transformer writes them back onto a map, all of whose queries start as copies of the
    first token (so it holds what is global); a convolutional decoder with adaptive norms draws the picture. Trained
    by the step `gigatok`.

    Args:
        image_size: Side in pixels, or (H, W); multiples of 2^(levels - 1), 16 as published.
        num_tokens: Tokens, K, a power of two; the finest blocks of the queries have to divide the map.
        encoder: Shape of the encoder's transformer, a published size or {width, depth, heads}.
        decoder: Shape of the decoder's transformer.
        quantizer: Any registered quantizer that needs no grid.
        channels: Base width of the convolutions.
        multipliers: Their width per level over `channels`, fine to coarse.
        inner: Channels of map and tokens.
        groups: Groups of the convolutions' norms, 32 as published; groups of one channel take the mean colour out.
        semantic_layer: Layer of the decoder's transformer, counted from 1, after which semantic features are read.
        semantic_dim: Channels of the teacher's features, 768 for DINOv2-B; null for none.
        start: Initialisation, `published` or `local` (ours, for short runs; see `vistok.layers.local_start`).

    Example:
        >>> tok = vistok.create("tokenizer", "gigatok_ss.in1k")
        >>> tok.encode("photo.jpg")
        Tokens(1 x 256 tokens, 14 bits each)
    """

    to_tokens: MapToTokens
    to_map: TokensToMap

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        num_tokens: int = 256,
        encoder: SizeName | Size = "small",
        decoder: SizeName | Size = "small",
        quantizer: Annotated[Spec, Of("quantizer")],
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        inner: int = 256,
        groups: int = 32,
        semantic_layer: int = 3,
        semantic_dim: int | None = 768,
        start: Start = "published",
    ) -> None:
        super().__init__()
        convs = (channels, tuple(multipliers), inner, groups)
        grid, encode, decode = self._build(image_size, num_tokens, (encoder, decoder), quantizer, convs)
        check_1d(self.quantizer, num_tokens)
        self.to_tokens = MapToTokens(grid, encode, inner, num_tokens)
        self.to_map = TokensToMap(grid, decode, inner, num_tokens)
        self._add_semantic(decode, semantic_layer, semantic_dim)
        if start == "local":
            self.to_tokens.start_local()
            self.to_map.start_local()

    def _quantizer_features(self, features: Tensor) -> Tensor:
        tokens = self.to_tokens(features)
        return float32_linear(float32_linear(tokens, self.to_tokens.head), self.quant_proj)

    def _rebuilt_features(self, codes: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        return self.to_map(self.code_proj(codes.to(self.code_proj.weight.dtype)), tap)


@register("tokenizer", "gigatok_2d")
class GigaTok2D(GigaTokBase):
    """GigaTok's 2D variant: tokens on the map's grid, vision transformers on both sides.

    Args:
        image_size: Side in pixels, or (H, W); multiples of 2^(levels - 1), 16 as published.
        encoder: Shape of the encoder's transformer, a published size or {width, depth, heads}.
        decoder: Shape of the decoder's transformer.
        quantizer: Any registered quantizer.
        layer: `plain` (S-B and B-L as published), or `query` (S-S, whose configuration names no layer).
        channels: Base width of the convolutions.
        multipliers: Their width per level over `channels`, fine to coarse.
        inner: Channels of map and tokens.
        groups: Groups of the convolutions' norms, 32 as published; groups of one channel take the mean colour out.
        semantic_layer: Layer of the decoder's transformer, counted from 1, after which semantic features are read.
        semantic_dim: Channels of the teacher's features, 768 for DINOv2-B; null for none.
    """

    to_tokens: MapToMap
    to_map: MapToMap

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        encoder: SizeName | Size = "small",
        decoder: SizeName | Size = "base",
        quantizer: Annotated[Spec, Of("quantizer")],
        layer: Layer = "plain",
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        inner: int = 256,
        groups: int = 32,
        semantic_layer: int = 3,
        semantic_dim: int | None = 768,
    ) -> None:
        super().__init__()
        convs = (channels, tuple(multipliers), inner, groups)
        grid, encode, decode = self._build(image_size, None, (encoder, decoder), quantizer, convs)
        self.factor = 2 ** (len(multipliers) - 1)
        self.num_tokens = self.quantizer.num_ids(grid[0] * grid[1], grid)
        self.to_tokens = MapToMap(grid, encode, inner, layer, kernel=1)
        self.to_map = MapToMap(grid, decode, inner, layer, kernel=3)
        self._add_semantic(decode, semantic_layer, semantic_dim)

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the tokens of a picture of `size` (H, W)."""
        return size[0] // self.factor, size[1] // self.factor

    def _quantizer_features(self, features: Tensor) -> Tensor:
        tokens, _ = self.to_tokens(to_sequence(features))
        return float32_linear(float32_linear(tokens, self.to_tokens.head), self.quant_proj)  # type: ignore[arg-type]

    def _rebuilt_features(self, codes: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        x, tapped = self.to_map(self.code_proj(codes.to(self.code_proj.weight.dtype)), tap)
        return self.to_map.head(to_map(x, self.to_map.grid)), tapped


def _mlp(width: int, out: int) -> nn.Sequential:
    hidden = 4 * width
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )


_TINY = {"width": 64, "depth": 3, "heads": 2}
for _name, _more in (("gigatok", {"num_tokens": 16}), ("gigatok_2d", {})):
    preset(
        "tokenizer",
        f"{_name}_tiny",
        builder=_name,
        config={
            "image_size": 64,
            **_more,
            "encoder": _TINY,
            "decoder": _TINY,
            "quantizer": {"name": "vq", "codebook_size": 256, "dim": 8, "l2_norm": True, "gradient": "rotation"},
            "channels": 32,
            "multipliers": [1, 1, 1, 1, 2],
            "inner": 64,
            "semantic_dim": 32,
        },
    )
