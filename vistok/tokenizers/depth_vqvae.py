"""AURORA's depth tokenizer: a convolutional VQ-VAE that turns a depth map into a few tokens of a small vocabulary."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.image import Preprocess
from vistok.layers.attention import float32_linear
from vistok.layers.conv import to_map, to_sequence
from vistok.quantizers.base import Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer
from vistok.tokens import Tokens

Residual = Literal["v1", "v2"]


class PlainResidual(nn.Module):
    """x + two 3x3 convolutions and a 1x1 one, without normalisation (variant `v1`, the published one)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        return x + self.net(x)


class NormedResidual(nn.Module):
    """ReLU of x + two 3x3 convolutions with batch norm (variant `v2` of AiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        return torch.relu(x + self.net(x))


RESIDUALS: dict[str, type[nn.Module]] = {"v1": PlainResidual, "v2": NormedResidual}


def _encoder(widths: list[int], out_dim: int, blocks: int, residual: Residual) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip([1, *widths], widths):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    layers += [RESIDUALS[residual](widths[-1]) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], out_dim, 1))


def _decoder(widths: list[int], in_dim: int, blocks: int, residual: Residual) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_dim, widths[-1], 1), nn.ReLU()]
    layers += [RESIDUALS[residual](widths[-1]) for _ in range(blocks)]
    falling = widths[::-1]
    for before, after in zip([falling[0], *falling], falling):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[0], 1, 1))


@register("tokenizer", "depth_vqvae")
class DepthVQVAE(Tokenizer):
    """Depth maps as tokens (AURORA, arXiv 2412.03548, section 3.2; the VQ-VAE of All in Tokens, arXiv 2301.02229).

    A depth map is a grey picture, higher = closer (inverse depth). Like every tokenizer here it takes and gives
    (B, 3, H, W) in [0, 1]: the first channel is read, and the decoded map stands in all three; `decode_map` gives the
    one channel. The official code works on [-1, 1], so its squared error is four times that of [0, 1]. Maps in other
    units (AiT's `max_value`) are divided by their maximum first. Resizing is to the exact size with the nearest pixel.

    The published codebook is trained by EMA (`vq_ema`, decay 0.99, commitment 0.25). The official code starts its sums
    independently of its codes, so that the first updates scatter them; ours start equal.

    Args:
        image_size: Side in pixels, or (H, W); multiples of `downsample_ratio`.
        downsample_ratio: Pixels per token along a side, a power of two of at least 2.
        hidden_dim: Channels of the finest level; doubled at every level.
        num_resnet_blocks: Residual blocks in the encoder, and as many in the decoder.
        residual: Kind of residual block, `v1` (published) or `v2` (with batch norm).
        quantizer: Any registered quantizer; 128 codes of 512 channels in the paper.

    Example:
        >>> tok = vistok.create("tokenizer", "aurora_depth")
        >>> tok.encode("depth.png").ids.shape                  # (1, 100), a 10 x 10 grid
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 320,
        downsample_ratio: int = 32,
        hidden_dim: int = 16,
        num_resnet_blocks: int = 2,
        residual: Residual = "v1",
        quantizer: Annotated[Spec, Of("quantizer")],
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        levels = downsample_ratio.bit_length() - 1
        if downsample_ratio < 2 or 2**levels != downsample_ratio:
            raise ValueError(f"downsample_ratio is a power of two of at least 2, got {downsample_ratio}.")
        if height < 1 or width < 1 or height % downsample_ratio or width % downsample_ratio:
            raise ValueError(f"image_size {height}x{width} is not a multiple of {downsample_ratio}.")
        self.factor = downsample_ratio
        self.preprocess = Preprocess(size=(height, width), crop="squash", resample="nearest", channels=1)
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        grid = self.grid_for((height, width))
        self.num_tokens = self.quantizer.num_ids(grid[0] * grid[1], grid)
        widths = [hidden_dim * 2**i for i in range(levels)]
        self.encoder = _encoder(widths, self.quantizer.in_dim, num_resnet_blocks, residual)
        self.decoder = _decoder(widths, self.quantizer.dim, num_resnet_blocks, residual)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder[-1].weight  # type: ignore[return-value]

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """One token per `downsample_ratio` pixels along a side."""
        return (size[0] // self.factor, size[1] // self.factor)

    def encode_features(self, images: Tensor) -> Tensor:
        """Maps in [0, 1], (B, 3, H, W), of which the first channel counts -> (B, h * w, quantizer.in_dim), float32."""
        last: nn.Conv2d = self.encoder[-1]  # type: ignore[assignment]
        return float32_linear(to_sequence(self.encoder[:-1]((2 * images[:, :1] - 1).to(last.weight.dtype))), last)

    def decode_codes(self, codes: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes (B, h * w, quantizer.dim) -> maps, unclamped, the same in three channels, (B, 3, H, W)."""
        first: nn.Conv2d = self.decoder[0]  # type: ignore[assignment]
        x = to_map(codes.to(first.weight.dtype), grid or self.grid_for(self.preprocess.size))
        return ((self.decoder(x) + 1) / 2).expand(-1, 3, -1, -1)

    @torch.no_grad()
    def decode_map(self, tokens: Tokens | Tensor) -> Tensor:
        """Tokens or ids (B, h * w) -> depth maps in [0, 1], higher = closer, (B, 1, H, W)."""
        return self.decode(tokens)[:, :1]

    @torch.no_grad()
    def decode_soft(self, probabilities: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Soft tokens: decode the mean code under a distribution over ids (AiT, arXiv 2301.02229, section 3.3).

        Args:
            probabilities: Weight of every id at every place, rows sum to 1, (B, h * w, V).
            grid: (h, w); that of the preprocessed size if None.

        Returns:
            Maps in [0, 1], (B, 1, H, W).

        Raises:
            ValueError: Another number of ids than the vocabulary's, or a quantizer of grouped or continuous codes.
        """
        vocab = self.quantizer.vocab_sizes
        if len(vocab) != 1 or probabilities.ndim != 3 or probabilities.shape[-1] != vocab[0]:
            raise ValueError(
                f"Soft tokens are (B, N, {vocab[0] if len(vocab) == 1 else 'one group of ids'}), "
                f"got {tuple(probabilities.shape)}."
            )
        table = self.quantizer.ids_to_codes(torch.arange(vocab[0], device=self.device).unsqueeze(0))[0]  # (V, D)
        codes = probabilities.to(table) @ table
        return self.decode_codes(codes, grid=grid)[:, :1].float().clamp(0, 1)


def value_at(depth: Tensor, x: float, y: float, *, size: float = 336.0) -> Tensor:
    """Depth at a marked point, as AURORA compares markers.

    Args:
        depth: Maps, (B, 1, H, W).
        x: Column of the point in a frame of `size` x `size`.
        y: Row of the point in that frame.
        size: Side of the frame the coordinates are in; questions are asked on 336 x 336 pixels.

    Returns:
        Value of the nearest pixel of every map, (B,).

    Raises:
        ValueError: A point outside the frame.
    """
    if not (0 <= x < size and 0 <= y < size):
        raise ValueError(f"The point ({x}, {y}) lies outside the frame of {size} x {size}.")
    height, width = depth.shape[-2:]
    return depth[:, 0, int(y * height / size), int(x * width / size)]


_EMA = {"name": "vq_ema", "decay": 0.99, "initial_count": 0.0, "commitment_weight": 0.25}
preset(
    "tokenizer",
    "aurora_depth",
    builder="depth_vqvae",
    config={"quantizer": {**_EMA, "codebook_size": 128, "dim": 512}},
)
preset(
    "tokenizer",
    "ait_depth",
    builder="depth_vqvae",
    config={"image_size": 480, "quantizer": {**_EMA, "codebook_size": 128, "dim": 512}},
)
preset(
    "tokenizer",
    "ait_mask",
    builder="depth_vqvae",
    config={
        "image_size": 64,
        "downsample_ratio": 16,
        "hidden_dim": 16,
        "quantizer": {**_EMA, "codebook_size": 128, "dim": 512},
    },
)
preset(
    "tokenizer",
    "depth_vqvae_tiny",
    builder="depth_vqvae",
    config={
        "image_size": 64,
        "downsample_ratio": 8,
        "hidden_dim": 8,
        "num_resnet_blocks": 1,
        "quantizer": {**_EMA, "codebook_size": 64, "dim": 16},
    },
)
