"""A nested 1D tokenizer: the digits of a picture's frequencies, most valuable first, and a decoder that learns."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.codec.planes import PlanePrior
from vistok.config import Of, Spec, create
from vistok.hub import load_strictly
from vistok.image import Preprocess
from vistok.layers.conv import to_map, to_sequence
from vistok.layers.exact import KeepFloat32
from vistok.layers.transformer import Size, Transformer, initialise
from vistok.quantizers.base import Quantizer
from vistok.registry import Weights, preset, register
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.spectral_titok import OPPONENT, ConvBlock, dct_matrix, expected_power
from vistok.tokenizers.titok import SIZES, SizeName

PLANES = 9
COARSEST = 0.5
"""First threshold per square root of the number of pixels; every plane halves it."""
DIGIT_COST = 1.0
"""Bits that a digit is taken to cost beyond its entropy when digits are ranked: what keeps tokens few."""
SPREAD = 0.9  # pictures differ in contrast: standard deviation of the logarithm of a coefficient's scale
PLACE_NEW, PLACE_FINER = 0.42, 0.48
"""Where in its interval a value is taken to lie: of a coefficient just found significant, and of a refined one."""
FOLD = 4
WHOLE = 7 / 32
"""Digits per coefficient of the picture that the decoder counts as one."""


def _tail(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(|c| > u) and E[|c|; |c| > u] of a unit-variance Laplacian whose scale is log-normal (Gauss-Hermite sum)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    scale = np.exp(SPREAD * nodes - SPREAD**2) / math.sqrt(2)  # E[c^2] = 1
    x = u[..., None] / scale
    mass = np.exp(-x) * weights / weights.sum()
    return mass.sum(-1), (mass * (u[..., None] + scale)).sum(-1)


def _entropy(p: np.ndarray) -> np.ndarray:
    p = p.clip(1e-12, 1 - 1e-12)
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def rank_digits(size: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` digits worth most: (coefficient in (3, H, W) row-major order, plane) of each, best first.

    Plane p of a coefficient says, while it is 0, whether its size exceeds T_p = T_0 2^-p and with which sign;
    afterwards in which half of its interval it lies. A digit is worth its expected gain in squared error per bit
    (entropy plus `DIGIT_COST`) under the power law of natural pictures; those of one coefficient stay in order.

    Raises:
        ValueError: The picture has fewer digits.
    """
    power = expected_power(size).reshape(-1)
    if not 1 <= count <= power.size * PLANES:
        raise ValueError(f"A picture of {size[0]}x{size[1]} has 1..{power.size * PLANES} digits, asked for {count}.")
    threshold = COARSEST * math.sqrt(size[0] * size[1]) * 2.0 ** -np.arange(PLANES)
    mass, moment = _tail(threshold[:, None] / np.sqrt(power))  # (P, C)
    moment = moment * np.sqrt(power)
    known = np.concatenate([np.zeros_like(mass[:1]), mass[:-1]])  # significant before this plane
    newly, first = mass - known, moment - np.concatenate([np.zeros_like(mass[:1]), moment[:-1]])
    bits = (1 - known) * _entropy(newly / (1 - known)) + newly + known + DIGIT_COST
    wide = np.concatenate([threshold[:1], threshold[:-1]])[:, None]
    gain = first**2 / newly.clip(1e-12) + known * wide**2 / 16
    value = _concave(gain, bits)
    coefficient = np.broadcast_to(np.arange(power.size), value.shape).ravel()
    plane = np.broadcast_to(np.arange(PLANES)[:, None], value.shape).ravel()
    order = np.lexsort((coefficient, plane, -value.ravel()))[:count]
    return coefficient[order], plane[order]


def _concave(gain: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Slopes of the upper concave hull of every column's gain over bits, (P, C): never rising along a column."""
    best = np.full_like(gain, -np.inf)
    for start in range(len(gain)):
        ahead = np.cumsum(gain[start:], 0) / np.cumsum(bits[start:], 0)
        best[start] = ahead.max(0)
    return np.minimum.accumulate(best, 0)


class PlaneCode(KeepFloat32):
    """Pictures to ternary digits and back: DCT of the whole picture in opponent colours, plane by plane.

    Args:
        size: (H, W) of the pictures.
        num_tokens: Tokens, K.
        digits: Digits per token, D.
    """

    coefficient: Tensor
    plane: Tensor
    vertical: Tensor
    horizontal: Tensor
    colours: Tensor

    def __init__(self, size: tuple[int, int], num_tokens: int, digits: int) -> None:
        super().__init__()
        coefficient, plane = rank_digits(size, num_tokens * digits)
        self.size = size
        self.register_buffer("coefficient", torch.tensor(coefficient).view(num_tokens, digits))
        self.register_buffer("plane", torch.tensor(plane).view(num_tokens, digits))
        self.register_buffer("vertical", dct_matrix(size[0], size[0]), persistent=False)
        self.register_buffer("horizontal", dct_matrix(size[1], size[1]), persistent=False)
        self.register_buffer("colours", torch.tensor(OPPONENT), persistent=False)

    def threshold(self, plane: int) -> float:
        """T_p."""
        return COARSEST * math.sqrt(self.size[0] * self.size[1]) * 2.0**-plane

    def analyse(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> digits, float32, (B, K, D)."""
        used, place = self.coefficient.unique(return_inverse=True)  # (C,), (K, D)
        with torch.autocast(images.device.type, enabled=False):
            x = torch.einsum("cd,bdhw->bchw", self.colours, images.float() - 0.5)
            c = (self.vertical @ x @ self.horizontal.T).flatten(1)[:, used]  # (B, C)
            size, low = c.abs(), torch.zeros_like(c)
            width = torch.zeros_like(c)  # 0 until the coefficient is significant
            planes = []
            for p in range(PLANES):
                threshold = self.threshold(p)
                known = width > 0
                fresh, upper = ~known & (size >= threshold), known & (size >= low + width / 2)
                planes.append(torch.where(known, torch.where(upper, 1.0, -1.0), fresh * c.sign()))
                low = torch.where(fresh, threshold, low + upper * width / 2)
                width = torch.where(fresh, threshold, width / 2)
            return torch.stack(planes, 1).flatten(1)[:, self.plane * len(used) + place]  # (B, K, D)

    @torch.no_grad()
    def synthesise(self, codes: Tensor) -> Tensor:
        """Digits (B, k, D), absent ones 0 -> pictures, float32, (B, 3, H, W). Without gradient."""
        b, k = codes.shape[:2]
        used, where = self.coefficient[:k].unique(return_inverse=True)  # (C,), (k, D)
        with torch.autocast(codes.device.type, enabled=False):
            every = codes.new_zeros(b, PLANES * len(used), dtype=torch.float32)
            every = every.index_copy(1, (self.plane[:k] * len(used) + where).flatten(), codes.float().flatten(1))
            sign = torch.zeros(b, len(used), device=codes.device)
            low, width, place = torch.zeros_like(sign), torch.zeros_like(sign), torch.zeros_like(sign)
            for p, digit in enumerate(every.unflatten(1, (PLANES, -1)).unbind(1)):
                known = width > 0
                fresh, finer = ~known & (digit != 0), known & (digit != 0)
                low = torch.where(fresh, self.threshold(p), low + (finer & (digit > 0)) * width / 2)
                width = torch.where(fresh, self.threshold(p), torch.where(finer, width / 2, width))
                sign = torch.where(fresh, digit, sign)
                place = torch.where(fresh, PLACE_NEW, torch.where(finer, PLACE_FINER, place))
            c = sign.new_zeros(b, 3 * self.size[0] * self.size[1])
            c = c.index_copy(1, used, sign * (low + place * width)).unflatten(1, (3, *self.size))
            x = self.vertical.T @ c @ self.horizontal  # (B, 3, H, W)
            return torch.einsum("cd,bchw->bdhw", self.colours, x) + 0.5


class PlaneRefiner(nn.Module):
    """What the digits leave out, added to the picture they give: convolutions around a transformer over patches.

    It knows how many tokens there were, because what is missing depends on it. The last layer starts at zero.

    Args:
        grid: Patches (h, w).
        patch_size: Side of a patch in pixels, a multiple of 4.
        share: What one token adds to the amount, see `WHOLE`; the whole is the most.
        size: Shape of the transformer.
        channels: Width of the convolutions, which see the picture folded 4 x 4.
        blocks: Convolutional blocks after the transformer.
    """

    def __init__(
        self, grid: tuple[int, int], patch_size: int, share: float, size: Size, channels: int, blocks: int
    ) -> None:
        super().__init__()
        width, self.grid, self.ratio, self.share = size.width, grid, patch_size // FOLD, share
        self.stem = nn.Conv2d(3 * FOLD**2, channels, 3, padding=1)
        self.before = ConvBlock(channels)
        self.patch_embed = nn.Conv2d(channels, width, self.ratio, stride=self.ratio)
        self.amount = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.position = nn.Parameter(torch.randn(grid[0] * grid[1], width) * width**-0.5)
        self.transformer = Transformer(width, size.depth, size.heads)
        self.norm = nn.LayerNorm(width)
        self.unfold = nn.Linear(width, channels * self.ratio**2)
        self.after = nn.Sequential(*(ConvBlock(channels) for _ in range(blocks)))
        self.head = nn.Conv2d(channels, 3 * FOLD**2, 3, padding=1)
        initialise(self.transformer)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, picture: Tensor, lengths: Tensor) -> Tensor:
        """Picture (B, 3, H, W) and tokens it was made of (B,) -> what to add to the picture, (B, 3, H, W)."""
        share = (lengths.to(picture.dtype) * self.share).clamp_max(1)  # longer codes were not trained with
        amount = self.amount(torch.stack([share, share.clamp_min(1e-4).log2() / 8], -1))  # (B, D)
        x = F.pixel_unshuffle(2 * picture - 1, FOLD).contiguous(memory_format=torch.channels_last)
        x = self.before(self.stem(x))  # (B, channels, H / 4, W / 4)
        y = self.transformer(to_sequence(self.patch_embed(x)) + self.position + amount.unsqueeze(1))
        y = to_map(self.unfold(self.norm(y)), self.grid)  # (B, channels * ratio^2, h, w)
        x = self.after(x + F.pixel_shuffle(y, self.ratio))
        return F.pixel_shuffle(self.head(F.silu(x)), FOLD)


@register("tokenizer", "spectral_planes")
class SpectralPlanes(Tokenizer):
    """Embedded code of a picture's frequencies in ternary digits, with a learned decoder; any prefix is a code.

    Our own design, for good pictures from few bytes after little training. The encoder is fixed: DCT coefficients of
    the whole picture, each written plane by plane as in embedded wavelet coders (Shapiro 1993), the digits of all
    coefficients ranked by what they gain per bit (`rank_digits`) and cut into K tokens of D. The decoder turns the
    digits back into coefficients and adds what a small network makes of the picture; it starts as the plain inverse
    transform. Training draws the number of tokens, short ones more often; see `draw_lengths`.

    Most digits are 0, so tokens hold far fewer bits than ids can: an entropy coder (`vistok.codec`) writes the 67 raw
    bits of a token of 42 digits in about 12.

    Args:
        image_size: Side in pixels, or (H, W); multiples of `patch_size`.
        patch_size: Side of a patch of the decoder in pixels, a multiple of 4.
        num_tokens: Tokens of a full code, K.
        decoder: Shape of the decoder's transformer, a published size of TiTok or {width, depth, heads}.
        channels: Width of the decoder's convolutions.
        blocks: Convolutional blocks behind the transformer.
        quantizer: A quantizer of digits -1, 0, 1: `ternary`.

    Example:
        >>> tok = vistok.create("tokenizer", "spectral_planes_tiny")
        >>> tok.decode(tok.encode("photo.jpg", num_tokens=8))
    """

    nested = True
    decoder_parts = ("decoder",)

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 128,
        patch_size: int = 16,
        num_tokens: int = 256,
        decoder: SizeName | Size = "small",
        channels: int = 64,
        blocks: int = 3,
        quantizer: Annotated[Spec, Of("quantizer")],
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if (
            patch_size < FOLD
            or patch_size % FOLD
            or height % patch_size
            or width % patch_size
            or min(height, width) < 1
        ):
            raise ValueError(
                f"image_size {height}x{width} must be a multiple of patch_size {patch_size}, and that of {FOLD}."
            )
        self.num_tokens = num_tokens
        self.preprocess = Preprocess(size=(height, width))
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        if quantizer["name"] != "ternary":
            raise ValueError(f"The code is made of digits -1, 0, 1: quantizer is ternary, got {quantizer['name']!r}.")
        self.code = PlaneCode((height, width), num_tokens, self.quantizer.dim)
        size = SIZES[decoder] if isinstance(decoder, str) else decoder
        grid = (height // patch_size, width // patch_size)
        share = self.quantizer.dim / (WHOLE * 3 * height * width)
        self.decoder = PlaneRefiner(grid, patch_size, share, size, channels, blocks)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.head.weight

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> digits (B, K, D), float32."""
        return self.code.analyse(images)

    def decode_codes(self, codes: Tensor, *, lengths: Tensor | None = None, **options: Any) -> Tensor:
        """Digits (B, k, D) -> pictures, unclamped, (B, 3, H, W)."""
        if lengths is None:
            lengths = torch.full((len(codes),), codes.shape[1], device=codes.device)
        valid = torch.arange(codes.shape[1], device=codes.device) < lengths.unsqueeze(1)
        picture = self.code.synthesise(codes * valid.unsqueeze(-1))
        return picture + self.decoder(picture.to(self.decoder.head.weight.dtype), lengths)

    def start_from(self, other: Tokenizer, source: str) -> None:
        """Take another model's decoder; its code may have more or fewer tokens, the same ones as far as it goes.

        Raises:
            LoadError: Weights that do not fit.
        """
        kept = {k: v for k, v in other.state_dict().items() if not k.startswith("code.")}
        own = {k: v for k, v in self.state_dict().items() if k.startswith("code.")}
        load_strictly(self, kept | own, source)

    def fit_prior(self, ids: Tensor) -> PlanePrior:
        """The entropy coder's prior from the ids of many pictures, (B, K, G)."""
        digits = self.quantizer.ids_to_codes(ids).cpu().numpy().astype(np.int8)
        radix = round(math.log(self.quantizer.vocab_sizes[0], 3))
        return PlanePrior.fit(digits, self.code.coefficient.cpu().numpy(), self.code.size, radix)

    def draw_lengths(self, uniform: Tensor) -> Tensor:
        """1 + floor(W u^1.5): every length up to W occurs, short ones, which are harder, more often. int64, (B,).

        W is K, or as many tokens as the decoder counts as the whole (`WHOLE`): more are for pictures of few details.
        """
        whole = min(self.num_tokens, round(1 / self.decoder.share))
        return 1 + (uniform**1.5 * whole).long().clamp_max(whole - 1)


preset(
    "tokenizer",
    "spectral_planes_tiny",
    builder="spectral_planes",
    config={
        "image_size": 64,
        "patch_size": 8,
        "num_tokens": 32,
        "decoder": {"width": 64, "depth": 2, "heads": 2},
        "channels": 32,
        "blocks": 1,
        "quantizer": {"name": "ternary", "dim": 42, "groups": 6},
    },
)
preset(
    "tokenizer",
    "spectral_planes_128.free",
    builder="spectral_planes",
    weights=Weights(
        shipped="spectral_planes_128",
        model_id="0409cfb8",
        licence_code="Apache-2.0",
        licence_weights="Apache-2.0; pictures CC0, public domain, CC-BY and CC-BY-SA (see vistok/weights/NOTICE.md)",
        trained_on="178 free photographs and paintings (recipes/get_data.py --set photos,lessons)",
        source="vistok/weights/spectral_planes_128/README.md",
    ),
    config={
        "image_size": 128,
        "patch_size": 16,
        "num_tokens": 1024,
        "decoder": {"width": 256, "depth": 4, "heads": 8},
        "channels": 64,
        "blocks": 3,
        "quantizer": {"name": "ternary", "dim": 42, "groups": 6},
    },
)
