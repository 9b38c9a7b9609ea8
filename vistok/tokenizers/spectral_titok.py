"""TiTok with a linear frequency path: a sound transform code before training, a tokenizer that learns on top of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.config import Of, Spec, create
from vistok.image import Preprocess
from vistok.layers.conv import to_map, to_sequence
from vistok.layers.exact import KeepFloat32
from vistok.layers.transformer import Size, Transformer, initialise
from vistok.quantizers.base import Quantizer
from vistok.quantizers.vq import TableQuantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.shape import check_1d, patch_grid
from vistok.tokenizers.titok import SIZES, SizeName, TiTokEncoder

# Orthonormal opponent colours: brightness, red against blue, green against both.
OPPONENT = ((1 / 3**0.5,) * 3, (1 / 2**0.5, 0.0, -1 / 2**0.5), (-1 / 6**0.5, 2 / 6**0.5, -1 / 6**0.5))
# Power of an orthonormal DCT coefficient is POWER[c] * H * W * radius ** -SLOPE[c]: the power law of natural pictures
# (Field 1987), its constants close to least squares on crops of the bundled training photographs, none held out.
POWER = (0.0264, 0.0082, 0.0017)
SLOPE = (2.37, 2.9, 2.7)
SMALLEST_RADIUS = 0.77  # stands for the mean, where the law has a pole
FOLD = 4
Scaling = Literal["auto", "channel", "token"]


def dct_matrix(rows: int, length: int) -> Tensor:
    """The first `rows` basis functions of the orthonormal DCT-II, (rows, length)."""
    k, i = torch.arange(rows, dtype=torch.float64).unsqueeze(1), torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(math.pi * (i + 0.5) * k / length) * math.sqrt(2 / length)
    return torch.where(k == 0, matrix / math.sqrt(2), matrix).float()


def expected_power(size: tuple[int, int]) -> np.ndarray:
    """Expected square of every DCT coefficient of a natural picture in opponent colours, (3, H, W)."""
    height, width = size
    v, u = np.mgrid[:height, :width].astype(np.float64)
    radius = np.sqrt(((v / height) ** 2 + (u / width) ** 2) * height * width).clip(SMALLEST_RADIUS)
    power = np.array(POWER).reshape(3, 1, 1) * height * width
    return power * radius ** -np.array(SLOPE).reshape(3, 1, 1)


def expand(codes: Tensor) -> Tensor:
    """Codes (...) -> c and c min(c^2, 1), (..., 2): together they undo the squashing of a bounded quantizer."""
    return torch.stack([codes, codes * codes.square().clamp(max=1)], dim=-1)


@torch.no_grad()
def calibrate(quantizer: Quantizer, samples: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """How to hand a unit-variance Laplacian number to each channel of a quantizer, and how to read it back.

    Tries a row of gains on quantiles of the distribution, shuffled channel by channel, and fits
    value = a c + b c min(c^2, 1) to the codes c by least squares; keeps the gain of least error per channel. Draws from
    a generator of its own and leaves the quantizer as it was.

    Returns:
        Gains (D,), a and b (D, 2), and the share of the variance that is lost (D,).
    """
    draw, dim = torch.Generator().manual_seed(0), quantizer.dim
    p = (torch.arange(samples) + 0.5) / samples - 0.5
    laplace = -p.sign() * torch.log1p(-2 * p.abs()) / math.sqrt(2)
    z = torch.stack([laplace[torch.randperm(samples, generator=draw)] for _ in range(dim)], dim=-1)  # (S, D)
    training = quantizer.training
    quantizer.eval()
    best = torch.ones(dim), torch.zeros(dim, 2), torch.full((dim,), torch.inf)
    for gain in np.geomspace(0.15, 2.5, 20).tolist():
        codes = quantizer(F.pad(z * gain, (0, quantizer.in_dim - dim)).unsqueeze(0), generator=draw).codes[0]
        curve, lost = _fit(expand(codes).transpose(0, 1).double(), z.T.double())
        better = lost <= best[2] + 1e-6  # a tie (continuous latents) goes to the largest gain, the best against noise
        found = torch.full((dim,), gain), curve, lost
        best = tuple(torch.where(better.view(-1, *(1,) * (n.ndim - 1)), n, o) for n, o in zip(found, best))
    quantizer.train(training)
    return best


def _fit(basis: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares per row, basis (D, S, 2) to target (D, S): weights (D, 2) and mean squared error (D,).

    A trace of ridge decides for the smallest weights where the two functions coincide (two or three levels).
    """
    gram = basis.transpose(1, 2) @ basis + 1e-6 * torch.eye(2, dtype=basis.dtype)
    weights = torch.linalg.solve(gram, basis.transpose(1, 2) @ target.unsqueeze(-1))  # (D, 2, 1)
    error = (target - (basis @ weights).squeeze(-1)).square().mean(1)
    return weights.squeeze(-1).float(), error.float()


@dataclass(frozen=True)
class Layout:
    """Which DCT coefficient goes where, and how it is scaled.

    Attributes:
        size: (H, W) of the pictures.
        index: Coefficient of every channel of every token, in (3, H, W) row-major order, (K, D).
        spread: What it is divided by, (K, D); 0 in channels that are left over.
        gain: What it is then multiplied by for the quantizer, (D,).
        curve: How a code is read back, (D, 2); see `expand`.
    """

    size: tuple[int, int]
    index: np.ndarray
    spread: np.ndarray
    gain: Tensor
    curve: Tensor


def lay_out(
    size: tuple[int, int], num_tokens: int, quantizer: Quantizer, scaling: Scaling, *, nested: bool = False
) -> Layout:
    """Rank the coefficients by expected power and hand them to tokens and channels.

    The K strongest make the first band, the next K the second, and so on; every token gets one of each band.
    `channel`: the first band goes to the channel that loses least (`calibrate`), and every coefficient is scaled to
    spread 1. `token`: bands are shuffled so that all tokens have about the same product of expected powers (each band's
    strongest goes to the token that is weakest so far), and a token is scaled as a whole to length 1. With `nested` the
    first tokens get the strongest of all instead, channel after channel, so that a prefix is a coarse picture.
    """
    if scaling == "auto":
        scaling = "token" if any(isinstance(m, TableQuantizer) for m in quantizer.modules()) else "channel"
    dim, power = quantizer.dim, expected_power(size).reshape(-1)
    gain, curve, order = torch.ones(dim), torch.tensor([[1.0, 0.0]]).repeat(dim, 1), list(range(dim))
    if scaling == "channel" and not torch.empty(0).is_meta:  # on the meta device only shapes are asked for
        gain, curve, lost = calibrate(quantizer)
        order = lost.argsort(stable=True).tolist()
    index, spread = np.zeros((num_tokens, dim), dtype=np.int64), np.zeros((num_tokens, dim))
    strongest, product = np.argsort(-power, kind="stable"), np.zeros(num_tokens)
    for band, channel in enumerate(order):
        chosen = strongest[band::dim][:num_tokens] if nested else strongest[band * num_tokens :][:num_tokens]
        shuffled = scaling == "token" and not nested
        tokens = np.argsort(product, kind="stable")[: len(chosen)] if shuffled else np.arange(len(chosen))
        index[tokens, channel], spread[tokens, channel] = chosen, np.sqrt(power[chosen])
        product[tokens] += np.log(power[chosen])
    if scaling == "token":
        spread = np.where(spread > 0, np.linalg.norm(spread, axis=1, keepdims=True), 0.0)
    return Layout(size, index, spread.astype(np.float32), gain, curve)


class _Frequencies(KeepFloat32):
    """What analysis and synthesis share: basis functions, and the place of every coefficient."""

    index: Tensor
    spread: Tensor
    vertical: Tensor
    horizontal: Tensor
    colours: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        colour, row, column = np.unravel_index(layout.index, (3, *layout.size))
        self.shape = (3, int(row.max()) + 1, int(column.max()) + 1)
        self.register_buffer("index", torch.tensor(np.ravel_multi_index((colour, row, column), self.shape)))
        self.register_buffer("spread", torch.tensor(layout.spread))
        self.register_buffer("vertical", dct_matrix(self.shape[1], layout.size[0]), persistent=False)
        self.register_buffer("horizontal", dct_matrix(self.shape[2], layout.size[1]), persistent=False)
        self.register_buffer("colours", torch.tensor(OPPONENT), persistent=False)


class FrequencyAnalysis(_Frequencies):
    """Pictures to features: every token gets its DCT coefficients, scaled to the range of the quantizer.

    Args:
        layout: Where each coefficient goes.
        in_dim: Channels of a feature; those beyond the code's (a Gaussian's log-variance) stay 0.
    """

    def __init__(self, layout: Layout, in_dim: int) -> None:
        super().__init__(layout)
        self.in_dim = in_dim
        self.gain = nn.Parameter(layout.gain.repeat(len(layout.index), 1))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, K, in_dim), float32."""
        with torch.autocast(images.device.type, enabled=False):
            x = torch.einsum("cd,bdhw->bchw", self.colours, images.float() - 0.5)
            coefficients = (self.vertical @ x @ self.horizontal.T).flatten(1)  # (B, 3 * rows * columns)
            scale = torch.where(self.spread > 0, self.gain / self.spread.clamp_min(1e-12), 0.0)
            features = coefficients[:, self.index] * scale  # (B, K, D)
            return F.pad(features, (0, self.in_dim - features.shape[-1]))


class FrequencySynthesis(_Frequencies):
    """Codes to pictures: the inverse DCT of what the codes say.

    Args:
        layout: Where each coefficient goes.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.curve = nn.Parameter(layout.curve.repeat(len(layout.index), 1, 1))

    def forward(self, codes: Tensor, valid: Tensor | None = None) -> Tensor:
        """Codes (B, k, D), k up to K, those that are `valid` (B, k) -> pictures, float32, (B, 3, H, W)."""
        k = codes.shape[1]
        with torch.autocast(codes.device.type, enabled=False):
            values = (expand(codes.float()) * self.curve[:k]).sum(-1) * self.spread[:k]  # (B, k, D)
            if valid is not None:
                values = torch.where(valid.unsqueeze(-1), values, 0.0)
            flat = values.new_zeros(len(codes), math.prod(self.shape))
            flat = flat.index_add(1, self.index[:k].flatten(), values.flatten(1))
            x = self.vertical.T @ flat.unflatten(1, self.shape) @ self.horizontal  # (B, 3, H, W)
            return torch.einsum("cd,bchw->bdhw", self.colours, x) + 0.5


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Refiner(nn.Module):
    """What the frequencies leave out: a transformer over patches and codes between convolutions, added to a picture.

    The last layer starts at zero, so that an untrained refiner adds nothing.

    Args:
        grid: Patches (h, w).
        patch_size: Side of a patch in pixels, a multiple of 4.
        num_tokens: Latent tokens, K.
        size: Shape of the transformer.
        in_dim: Channels of a code.
        channels: Width of the convolutions, which see the picture folded 4 x 4.
    """

    def __init__(
        self, grid: tuple[int, int], patch_size: int, num_tokens: int, size: Size, in_dim: int, channels: int
    ) -> None:
        super().__init__()
        width, self.grid, self.ratio = size.width, grid, patch_size // FOLD
        self.stem = nn.Conv2d(3 * FOLD**2, channels, 3, padding=1)
        self.before = ConvBlock(channels)
        self.patch_embed = nn.Conv2d(channels, width, self.ratio, stride=self.ratio)
        self.code_embed = nn.Linear(in_dim, width)
        self.position = nn.Parameter(torch.randn(grid[0] * grid[1], width) * width**-0.5)
        self.code_position = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.transformer = Transformer(width, size.depth, size.heads)
        self.norm = nn.LayerNorm(width)
        self.unfold = nn.Linear(width, channels * self.ratio**2)
        self.after = nn.Sequential(ConvBlock(channels), ConvBlock(channels))
        self.head = nn.Conv2d(channels, 3 * FOLD**2, 3, padding=1)
        initialise(self.transformer)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, picture: Tensor, codes: Tensor, valid: Tensor | None = None) -> Tensor:
        """Picture (B, 3, H, W) and codes (B, k, in_dim), all or those that are `valid` (B, k) -> what to add to it."""
        x = F.pixel_unshuffle(2 * picture - 1, FOLD).contiguous(memory_format=torch.channels_last)
        x = self.before(self.stem(x))  # (B, channels, H / 4, W / 4)
        patches = to_sequence(self.patch_embed(x)) + self.position  # (B, h * w, D)
        tokens = self.code_embed(codes) + self.code_position[: codes.shape[1]]  # (B, k, D)
        if valid is not None:
            valid = torch.cat([valid.new_ones(patches.shape[:2]), valid], dim=1)
        y = self.transformer(torch.cat([patches, tokens], dim=1), rows=slice(0, len(self.position)), valid=valid)
        y = to_map(self.unfold(self.norm(y)), self.grid)  # (B, channels * ratio^2, h, w)
        x = self.after(x + F.pixel_shuffle(y, self.ratio))
        return F.pixel_shuffle(self.head(F.silu(x)), FOLD)


@register("tokenizer", "spectral_titok")
class SpectralTiTok(Tokenizer):
    """TiTok whose encoder and decoder each have a linear frequency path beside the transformer.

    Our own variant of TiTok (arXiv 2406.07550), for training on few pictures in little time. The features of the K
    latent tokens are DCT coefficients of the whole picture plus the output of TiTok's encoder; the decoded picture is
    their inverse DCT plus the output of a transformer over patches and codes between a few convolutions. Both
    transformer outputs start at zero, so that the model starts as a plain transform code; everything is trained.

    Any quantizer of 1D tokens fits. The channels of scalar quantizers are measured, and those with the finest steps get
    the coefficients with the most expected power, so that unequal levels pay: untrained, fsq_symmetric
    [32, 8, 4, 2, 2] is 1.5 dB above [8, 8, 8, 8] on the held-out photographs. For quantizers with a codebook all tokens
    become vectors of alike statistics, which share it well; such a model decodes grey until the codebook has learnt.

    Args:
        image_size: Side in pixels, or (H, W); multiples of `patch_size`.
        patch_size: Side of a patch in pixels, a multiple of 4.
        num_tokens: Latent tokens, K.
        encoder: Shape of the encoder, a published size of TiTok or {width, depth, heads}.
        decoder: Shape of the decoder's transformer.
        channels: Width of the decoder's convolutions.
        scaling: Coefficients scaled one by one (`channel`) or token by token (`token`); `auto` takes `token` for
            quantizers with a codebook.
        nested: Let any prefix of the tokens decode: the first tokens get the strongest coefficients, and training
            decodes random prefixes (tail token drop, arXiv 2501.10064).
        quantizer: Any registered quantizer that needs no grid.

    Example:
        >>> quantizer = {"name": "fsq_symmetric", "levels": [32, 8, 4, 2, 2]}
        >>> tok = vistok.create("tokenizer", "spectral_titok", quantizer=quantizer)
        >>> tok.decode(tok.encode("photo.jpg"))      # a fair picture, and nothing was trained yet
    """

    decoder_parts = ("decoder", "synthesis")

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 128,
        patch_size: int = 16,
        num_tokens: int = 128,
        encoder: SizeName | Size = "small",
        decoder: SizeName | Size = "small",
        channels: int = 64,
        scaling: Scaling = "auto",
        nested: bool = False,
        quantizer: Annotated[Spec, Of("quantizer")],
    ) -> None:
        super().__init__()
        if patch_size < FOLD or patch_size % FOLD:
            raise ValueError(f"patch_size is a multiple of {FOLD}, got {patch_size}.")
        (height, width), grid = patch_grid(image_size, patch_size)
        if not 1 <= num_tokens <= 3 * height * width:
            raise ValueError(f"num_tokens is 1..{3 * height * width} (one frequency each at least), got {num_tokens}.")
        encode, decode = (SIZES[s] if isinstance(s, str) else s for s in (encoder, decoder))
        self.num_tokens, self.nested = num_tokens, nested
        self.preprocess = Preprocess(size=(height, width))
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        check_1d(self.quantizer, num_tokens)
        dim, in_dim = self.quantizer.dim, self.quantizer.in_dim
        layout = lay_out((height, width), num_tokens, self.quantizer, scaling, nested=nested)
        self.analysis = FrequencyAnalysis(layout, in_dim)
        self.encoder = TiTokEncoder(grid, patch_size, num_tokens, encode, in_dim, legacy_layout=False)
        self.synthesis = FrequencySynthesis(layout)
        self.decoder = Refiner(grid, patch_size, num_tokens, decode, dim, channels)
        initialise(self.encoder)
        nn.init.zeros_(self.encoder.head.weight)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.head.weight

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, K, quantizer.in_dim), float32."""
        return self.analysis(images) + self.encoder(images)

    def decode_codes(self, codes: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, K, quantizer.dim) -> pictures, unclamped, (B, 3, H, W)."""
        valid = None
        if lengths is not None:
            valid = torch.arange(codes.shape[1], device=codes.device) < lengths.unsqueeze(1)
        picture = self.synthesis(codes, valid)  # float32, whatever the weights are
        dtype = self.decoder.head.weight.dtype
        return picture + self.decoder(picture.to(dtype), codes.to(dtype), valid)


_TINY = {"width": 64, "depth": 2, "heads": 2}
preset(
    "tokenizer",
    "spectral_titok_tiny",
    builder="spectral_titok",
    config={
        "image_size": 64,
        "patch_size": 8,
        "num_tokens": 32,
        "encoder": _TINY,
        "decoder": _TINY,
        "channels": 32,
        "quantizer": {"name": "fsq_symmetric", "levels": [32, 8, 4, 2, 2]},
    },
)
