"""GigaTok: convolutions around a transformer around a code book, from 136 M to 2.9 B parameters (arXiv 2504.08736)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.image import Preprocess
from vistok.layers.attention import float32_linear
from vistok.layers.conv import to_map, to_sequence
from vistok.layers.position import resize_table
from vistok.layers.query import QueryTransformer
from vistok.layers.transformer import Transformer
from vistok.layers.unet import PictureDecoder, PictureEncoder
from vistok.quantizers.base import Quantized, Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer, TokenizerOutput
from vistok.tokenizers.titok import Size, initialise

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
Layer = Literal["query", "plain"]


class Trunk(nn.Module):
    """What all four transformers share: an embedding with a norm in front, positions of the map, a norm at the end.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of what comes in.
    """

    def __init__(self, grid: tuple[int, int], size: Size, channels: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm_pre = nn.LayerNorm(channels)
        self.embed = nn.Linear(channels, size.width)
        self.position = _table(grid[0] * grid[1], size.width)
        self.norm_post = nn.LayerNorm(size.width)

    def embedded(self, x: Tensor) -> Tensor:
        """(B, N, channels) -> (B, N, D)."""
        return self.embed(self.norm_pre(x.to(self.embed.weight.dtype)))


class MapToTokens(Trunk):
    """1D encoder: queries averaged from the map at many scales attend to the map.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of the map, and of the tokens.
        num_tokens: K, a power of two.
    """

    def __init__(self, grid: tuple[int, int], size: Size, channels: int, num_tokens: int) -> None:
        super().__init__(grid, size, channels)
        self.blocks_of = query_grids(num_tokens, grid)
        self.latent_position = _table(num_tokens, size.width)
        self.query_proj = nn.Linear(size.width, size.width)
        self.transformer = QueryTransformer(size.width, size.depth, size.heads)
        self.head = nn.Linear(size.width, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels, h, w) -> the last layer's norm, (B, K, D), before `head`."""
        memory = self.embedded(to_sequence(features))
        image = to_map(memory, self.grid)
        means = [to_sequence(F.adaptive_avg_pool2d(image, blocks)) for blocks in self.blocks_of]
        queries = self.query_proj(torch.cat(means, dim=1))
        x, _ = self.transformer(queries, memory, self.position, self.latent_position)
        return self.norm_post(x)


class TokensToMap(Trunk):
    """1D decoder: as many copies of the first token as the map has positions attend to the tokens.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of the tokens, and of the map.
        num_tokens: K.
    """

    def __init__(self, grid: tuple[int, int], size: Size, channels: int, num_tokens: int) -> None:
        super().__init__(grid, size, channels)
        self.latent_position = _table(num_tokens, size.width)
        self.transformer = QueryTransformer(size.width, size.depth, size.heads)
        self.head = nn.Conv2d(size.width, channels, 3, padding=1)

    def forward(self, tokens: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, K, channels) -> map (B, channels, h, w), and the stream (B, h * w, D) after layer `tap`."""
        memory = self.embedded(tokens)
        queries = memory[:, :1].expand(-1, len(self.position), -1)
        x, tapped = self.transformer(queries, memory, self.latent_position, self.position, tap)
        return self.head(to_map(self.norm_post(x), self.grid)), tapped


class MapToMap(Trunk):
    """Encoder or decoder of the 2D variant: a transformer over the positions of the map.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of the map, in and out.
        layer: `plain`: pre-norm blocks, positions added once to the stream; `query`: the 1D variant's layers, with
            the stream itself as memory.
        kernel: Kernel of the last layer, 1 or 3.
    """

    def __init__(self, grid: tuple[int, int], size: Size, channels: int, layer: Layer, kernel: int) -> None:
        super().__init__(grid, size, channels)
        make = {"plain": Transformer, "query": QueryTransformer}[layer]
        self.transformer = make(size.width, size.depth, size.heads)
        wide = nn.Conv2d(size.width, channels, kernel, padding=kernel // 2)
        self.head: nn.Module = wide if kernel > 1 else nn.Linear(size.width, channels)

    def forward(self, tokens: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, h * w, channels) -> the last layer's norm (B, h * w, D), and the stream after layer `tap`."""
        x = self.embedded(tokens)
        if isinstance(self.transformer, QueryTransformer):
            x, tapped = self.transformer(x, None, self.position, self.position, tap)
        else:
            x, tapped = _tapped(self.transformer, x + self.position, tap)
        return self.norm_post(x), tapped


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
        channels: tuple[int, tuple[int, ...], int],
    ) -> tuple[tuple[int, int], Size, Size]:
        """Set everything but the transformers; the map's (h, w) and the sizes of both transformers."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        base, multipliers, inner = channels
        factor = 2 ** (len(multipliers) - 1)
        if min(height, width) < factor or height % factor or width % factor:
            raise ValueError(f"image_size {height}x{width} is not a multiple of {factor}.")
        if base < 32 or base % 32:
            raise ValueError(f"channels is a multiple of 32 (groups of the norms), got {base}.")
        grid = (height // factor, width // factor)
        self.num_tokens = num_tokens or grid[0] * grid[1]
        self.preprocess = Preprocess(size=(height, width))
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        self.encoder = PictureEncoder(base, multipliers, inner)
        self.decoder = PictureDecoder(base, multipliers, inner)
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
        semantic_layer: Layer of the decoder's transformer, counted from 1, after which semantic features are read.
        semantic_dim: Channels of the teacher's features, 768 for DINOv2-B; null for none.

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
        semantic_layer: int = 3,
        semantic_dim: int | None = 768,
    ) -> None:
        super().__init__()
        convs = (channels, tuple(multipliers), inner)
        grid, encode, decode = self._build(image_size, num_tokens, (encoder, decoder), quantizer, convs)
        if self.quantizer.num_ids(num_tokens) != num_tokens:
            name = type(self.quantizer).__name__
            raise ValueError(f"{name} needs a grid of features and 1D tokens have none. Choose another quantizer.")
        self.to_tokens = MapToTokens(grid, encode, inner, num_tokens)
        self.to_map = TokensToMap(grid, decode, inner, num_tokens)
        self._add_semantic(decode, semantic_layer, semantic_dim)

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
        semantic_layer: int = 3,
        semantic_dim: int | None = 768,
    ) -> None:
        super().__init__()
        convs = (channels, tuple(multipliers), inner)
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


def query_grids(num_tokens: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(h, w) blocks that the queries are means of, coarse to fine: 1x1, 1x1, 1x2, 2x2, 2x4, ...; K in all.

    Raises:
        ValueError: K is no power of two, or its finest blocks do not divide the map.
    """
    steps = num_tokens.bit_length() - 1
    if num_tokens < 1 or num_tokens != 2**steps:
        raise ValueError(f"num_tokens is a power of two for GigaTok's queries, got {num_tokens}.")
    levels = [max(i - 1, 0) for i in range(steps + 1)]
    found = [(2 ** (level // 2), 2 ** ((level + 1) // 2)) for level in levels]
    if grid[0] % found[-1][0] or grid[1] % found[-1][1]:
        fine = f"{found[-1][0]}x{found[-1][1]}"
        raise ValueError(f"{num_tokens} tokens need a map of multiples of {fine}, and this one is {grid[0]}x{grid[1]}.")
    return found


def _tapped(transformer: Transformer, x: Tensor, tap: int | None) -> tuple[Tensor, Tensor | None]:
    """A plain transformer's output, and its stream after block `tap`."""
    if tap is None:
        return transformer(x), None
    kept: list[Tensor] = []
    handle = transformer.blocks[tap - 1].register_forward_hook(lambda module, args, out: kept.append(out))
    try:
        return transformer(x), kept[0]
    finally:
        handle.remove()


def _mlp(width: int, out: int) -> nn.Sequential:
    hidden = 4 * width
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )


def _table(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width) * width**-0.5)


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
