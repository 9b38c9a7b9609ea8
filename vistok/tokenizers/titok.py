"""TiTok: 1D image tokenizers (arXiv 2406.07550), single-stage and two-stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.image import Preprocess
from vistok.layers import local_start
from vistok.layers.attention import float32_linear
from vistok.layers.conv import to_map
from vistok.layers.position import learned_table, resize_table
from vistok.layers.transformer import Size, Transformer, initialise
from vistok.quantizers.base import Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer, TokenizerOutput
from vistok.tokenizers.maskgit_vqgan import MaskGITDecoder, MaskGITVQGAN
from vistok.tokenizers.shape import check_1d, patch_grid

SIZES = {"small": Size(512, 8, 8), "base": Size(768, 12, 12), "large": Size(1024, 24, 16)}
SizeName = Literal["small", "base", "large"]


class TiTokEncoder(nn.Module):
    """ViT over [class, patches, latent tokens] that keeps only the latent tokens.

    Args:
        grid: Patches (h, w).
        patch_size: Side of a patch in pixels.
        num_tokens: Latent tokens, K.
        size: Shape of the transformer.
        out_dim: Channels per token handed to the quantizer.
        legacy_layout: Reshape the (K, D) features to (D, K) without transposing them, as the published two-stage
            weights were trained (every token mixes features of all latents).
    """

    def __init__(
        self, grid: tuple[int, int], patch_size: int, num_tokens: int, size: Size, out_dim: int, *, legacy_layout: bool
    ) -> None:
        super().__init__()
        width, patches = size.width, grid[0] * grid[1]
        self.legacy_layout, self.num_tokens = legacy_layout, num_tokens
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = learned_table(1, width)
        self.position = learned_table(1 + patches, width)
        self.latents = learned_table(num_tokens, width)
        self.latent_position = learned_table(num_tokens, width)
        self.norm_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, size.depth, size.heads)
        self.norm_post = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> features (B, K, out_dim), float32."""
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)  # (B, h * w, D)
        batch = x.shape[0]
        x = x + self.position[1:]
        head = (self.class_token + self.position[:1]).to(x.dtype).expand(batch, -1, -1)
        latents = (self.latents + self.latent_position).to(x.dtype).expand(batch, -1, -1)
        x = self.norm_pre(torch.cat([head, x, latents], dim=1))  # (B, 1 + h * w + K, D)
        x = self.transformer(x, rows=slice(x.shape[1] - self.num_tokens, None))  # (B, K, D)
        x = self.norm_post(x)
        if self.legacy_layout:
            x = x.reshape(batch, -1, self.num_tokens).transpose(1, 2)  # (B, K, D) with mixed contents
        return float32_linear(x, self.head)

    @torch.no_grad()
    def start_local(self) -> None:
        """Let every latent token begin at its own patches; see `vistok.layers.local_start`."""
        patches, tokens = local_start.places(len(self.position) - 1, *self.latents.shape)
        self.position[1:] = patches
        self.latents.zero_()
        self.latent_position.copy_(tokens)
        local_start.embed_pixels(self.patch_embed)
        local_start.attend_by_place(self.transformer)
        local_start.read_content(self.head)


class TiTokDecoder(nn.Module):
    """ViT over [class, mask tokens, latent tokens] that keeps only the mask tokens.

    Args:
        grid: Patches (h, w).
        num_tokens: Latent tokens, K.
        size: Shape of the transformer.
        in_dim: Channels of a code.
    """

    def __init__(self, grid: tuple[int, int], num_tokens: int, size: Size, in_dim: int) -> None:
        super().__init__()
        width = size.width
        self.grid = grid
        self.embed = nn.Linear(in_dim, width)
        self.class_token = learned_table(1, width)
        self.mask_token = learned_table(1, width)
        self.position = learned_table(1 + grid[0] * grid[1], width)
        self.latent_position = learned_table(num_tokens, width)
        self.norm_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, size.depth, size.heads)
        self.norm_post = nn.LayerNorm(width)

    def forward(self, codes: Tensor, context: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, K, in_dim), optional context tokens (B, L, D) -> patch features (B, h * w, D).

        Fewer codes than were trained are a shorter sequence; none attends to codes beyond a row's `lengths` (B,).
        """
        x = self.embed(codes.to(self.embed.weight.dtype))
        x = x + self.latent_position[: x.shape[1]]  # (B, K, D)
        patches = self.position.shape[0] - 1
        masks = torch.cat([self.class_token, self.mask_token.expand(patches, -1)]) + self.position
        # Masks and positions do not depend on the picture, so their layer norm is computed once for the batch.
        masks = self.norm_pre(masks).to(x.dtype).expand(x.shape[0], -1, -1)
        rest = self.norm_pre(x if context is None else torch.cat([x, context.to(x.dtype)], dim=1))
        valid = None
        if lengths is not None:
            valid = torch.ones(len(x), 1 + patches + rest.shape[1], dtype=torch.bool, device=x.device)
            valid[:, 1 + patches :][:, : x.shape[1]] = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        x = self.transformer(torch.cat([masks, rest], dim=1), rows=slice(1, 1 + patches), valid=valid)  # (B, h * w, D)
        return self.norm_post(x)

    @torch.no_grad()
    def start_local(self) -> None:
        """Let every mask token begin by reading the latents of its own patch; see `vistok.layers.local_start`."""
        patches, tokens = local_start.places(len(self.position) - 1, *self.latent_position.shape)
        self.position[1:] = patches
        self.mask_token.zero_()
        self.latent_position.copy_(tokens)
        local_start.write_content(self.embed)
        local_start.attend_by_place(self.transformer)


class PixelHead(nn.Module):
    """Patch features to pixels: a linear map per patch, then a 3x3 convolution over the seams."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.to_patch = nn.Linear(width, patch_size * patch_size * 3)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h * w, D) -> (B, 3, H, W)."""
        p = self.patch_size
        x = self.to_patch(x).unflatten(2, (p, p, 3)).unflatten(1, grid)  # (B, h, w, p, p, 3)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, 3, h * p, w * p)
        return self.smooth(x)

    def start_local(self) -> None:
        """Begin with faint contents on grey; see `vistok.layers.local_start`."""
        local_start.draw_pixels(self.to_patch, self.smooth)


class CodeHead(nn.Sequential):
    """Patch features to logits over the codes of a proxy tokenizer."""

    def __init__(self, width: int, codebook_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.Tanh()
        self.fc2 = nn.Linear(2 * width, codebook_size)

    def start_local(self) -> None:
        """Begin by reading contents; see `vistok.layers.local_start`."""
        local_start.read_content(self.fc1)


class TiTokBase(Tokenizer):
    """What single-stage and two-stage TiTok share: encoder, quantizer, decoder trunk, sizes."""

    encoder: TiTokEncoder
    decoder: TiTokDecoder
    head: PixelHead | CodeHead

    def _build(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        num_tokens: int,
        quantizer: Spec,
        sizes: Sequence[Any],
        legacy: bool,
    ) -> Size:
        sides, grid = patch_grid(image_size, patch_size)
        encoder, decoder = (SIZES[s] if isinstance(s, str) else s if isinstance(s, Size) else Size(**s) for s in sizes)
        self.num_tokens = num_tokens
        self.preprocess = Preprocess(size=sides)
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        check_1d(self.quantizer, num_tokens)
        self.encoder = TiTokEncoder(grid, patch_size, num_tokens, encoder, self.quantizer.in_dim, legacy_layout=legacy)
        self.decoder = TiTokDecoder(grid, num_tokens, decoder, self.quantizer.dim)
        return decoder

    def _start(self, start: local_start.Start) -> None:
        if start == "local":
            self.encoder.start_local()
            self.decoder.start_local()
            self.head.start_local()

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, K, quantizer.in_dim), float32."""
        return self.encoder(images)

    def _resized_state(self, other: Any) -> dict[str, Tensor]:
        state = self.state_dict()
        for part in ("encoder", "decoder"):
            key = f"{part}.position"
            state[key] = resize_table(state[key], self.decoder.grid, other.decoder.grid, prefix=1)
        return state


@register("tokenizer", "titok")
class TiTok(TiTokBase):
    """Single-stage TiTok: a picture as K 1D tokens, decoded straight to pixels.

    The released `*_vq8k` and `*_vae` models. Differs from the two-stage models in the pixel head and in a proper
    transpose of the latent features.

    Args:
        image_size: Side in pixels, or (H, W); multiples of `patch_size`.
        patch_size: Side of a patch in pixels.
        num_tokens: Latent tokens, K.
        encoder: Shape of the encoder, a published size or {width, depth, heads}.
        decoder: Shape of the decoder.
        quantizer: Any registered quantizer; its `in_dim` and `dim` set the width of the latent.
        start: Initialisation, `published` or `local` (ours, for short runs; see `vistok.layers.local_start`).

    Example:
        >>> tok = vistok.create("tokenizer", "titok_bl128_vq8k.in1k")
        >>> tok.encode("photo.jpg")
        Tokens(1 x 128 tokens, 13 bits each)
    """

    decoder_parts = ("decoder", "head")

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        num_tokens: int = 128,
        encoder: SizeName | Size = "small",
        decoder: SizeName | Size = "small",
        quantizer: Annotated[Spec, Of("quantizer")],
        start: local_start.Start = "published",
    ) -> None:
        super().__init__()
        size = self._build(image_size, patch_size, num_tokens, quantizer, (encoder, decoder), legacy=False)
        self.head = PixelHead(size.width, patch_size)
        initialise(self.encoder, self.decoder, self.head)
        self._start(start)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.head.smooth.weight

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, K, quantizer.dim) -> pictures, unclamped, (B, 3, H, W)."""
        return self.head(self.decoder(codes), self.decoder.grid)


@register("tokenizer", "titok_two_stage")
class TwoStageTiTok(TiTokBase):
    """Two-stage TiTok: the decoder predicts MaskGIT-VQGAN codes, a convolutional decoder turns them into pixels.

    Stage 1 trains encoder and decoder on the proxy codes (`forward` gives them as `extras["logits"]`,
    (B, h * w, V)); stage 2 fine-tunes both decoders on pixels. The codes handed to the pixel decoder are the
    softmax-weighted mean of the proxy codebook, as in the official code, and not the arg max.

    Args:
        image_size: Side in pixels, or (H, W); multiples of 16.
        num_tokens: Latent tokens, K.
        encoder: Shape of the encoder, a published size or {width, depth, heads}.
        decoder: Shape of the decoder.
        quantizer: Any registered quantizer.
        legacy_layout: The published weights were trained with latent features reshaped instead of transposed.
            Keep True to load them.
        proxy_codes: Codes of the proxy tokenizer; 1024 for the published weights.
        proxy_dim: Channels of a proxy code; 256 for the published weights.
        pixel_channels: Base width of the pixel decoder; 128 for the published weights.
        pixel_groups: Groups of its norms; 32 for the published weights.
        start: `published` or `local` (ours, see `vistok.layers.local_start`), which is best without `legacy_layout`.
    """

    decoder_parts = ("decoder", "head", "pixel_codebook", "pixel_decoder")

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        num_tokens: int = 128,
        encoder: SizeName | Size = "small",
        decoder: SizeName | Size = "small",
        quantizer: Annotated[Spec, Of("quantizer")],
        legacy_layout: bool = True,
        proxy_codes: int = 1024,
        proxy_dim: int = 256,
        pixel_channels: int = 128,
        pixel_groups: int = 32,
        start: local_start.Start = "published",
    ) -> None:
        super().__init__()
        size = self._build(image_size, 16, num_tokens, quantizer, (encoder, decoder), legacy=legacy_layout)
        self.head = CodeHead(size.width, proxy_codes)
        self.pixel_codebook = nn.Embedding(proxy_codes, proxy_dim)
        self.pixel_decoder = MaskGITDecoder(proxy_dim, channels=pixel_channels, groups=pixel_groups)
        initialise(self.encoder, self.decoder, self.head)
        self._start(start)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.pixel_decoder.conv_out.weight

    def take_pixel_decoder(self, proxy: MaskGITVQGAN) -> None:
        """Copy codebook and decoder of the proxy tokenizer, as the official stage 2 starts.

        Raises:
            ValueError: The proxy has other sizes.
        """
        table = getattr(proxy.quantizer, "codes", None)
        if table is None:
            raise ValueError(
                f"The proxy has a {proxy.quantizer.registry_name} quantizer; it has to be one with a table of codes."
            )
        own = self.pixel_codebook.weight
        theirs, ours = proxy.decoder, self.pixel_decoder
        facts = [(d.conv_out.weight.shape[1], d.norm_out.num_groups) for d in (theirs, ours)]
        if table.shape != own.shape or facts[0] != facts[1]:
            raise ValueError(
                f"The proxy tokenizer has {table.shape[0]} codes of {table.shape[1]} channels, width {facts[0][0]} and "
                f"{facts[0][1]} groups. Set proxy_codes, proxy_dim, pixel_channels and pixel_groups to these."
            )
        with torch.no_grad():
            own.copy_(table)
        ours.load_state_dict(theirs.state_dict())

    def decode_logits(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, K, quantizer.dim) -> logits over the proxy codes, (B, h * w, V)."""
        return self.head(self.decoder(codes, lengths=lengths))

    def logits_to_pixels(self, logits: Tensor) -> Tensor:
        """Proxy logits (B, h * w, V) -> pictures, unclamped, (B, 3, H, W)."""
        soft = logits.float().softmax(-1).to(self.pixel_codebook.weight.dtype) @ self.pixel_codebook.weight
        return self.pixel_decoder(to_map(soft, self.decoder.grid))

    def decode_codes(self, codes: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, K, quantizer.dim) -> pictures, unclamped, (B, 3, H, W)."""
        return self.logits_to_pixels(self.decode_logits(codes, lengths))

    def forward(
        self,
        images: Tensor,
        *,
        lengths: Tensor | None = None,
        text: None = None,
        generator: torch.Generator | None = None,
        pixels: bool = True,
    ) -> TokenizerOutput:
        """As `Tokenizer.forward`, with `extras["logits"]`; without `pixels` (stage 1) the pixel decoder is skipped."""
        tokens, quantized = self.tokenize(images, text=text, generator=generator)
        codes, short = self._shortened(quantized.codes, lengths)
        logits = self.decode_logits(codes, **short)
        rebuilt = self.logits_to_pixels(logits) if pixels else None
        return TokenizerOutput(images=rebuilt, tokens=tokens, quantized=quantized, extras={"logits": logits})


_TINY = {"width": 64, "depth": 2, "heads": 2}
preset(
    "tokenizer",
    "titok_tiny",
    builder="titok",
    config={
        "image_size": 64,
        "patch_size": 8,
        "num_tokens": 16,
        "encoder": _TINY,
        "decoder": _TINY,
        "quantizer": {"name": "vq", "codebook_size": 256, "dim": 8, "l2_norm": True},
    },
)
preset(
    "tokenizer",
    "titok_two_stage_tiny",
    builder="titok_two_stage",
    config={
        "image_size": 64,
        "num_tokens": 16,
        "encoder": _TINY,
        "decoder": _TINY,
        "quantizer": {"name": "vq", "codebook_size": 256, "dim": 8, "l2_norm": True},
        "proxy_codes": 64,
        "proxy_dim": 8,
        "pixel_channels": 32,
    },
)
