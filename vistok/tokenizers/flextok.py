"""FlexTok: a picture as an ordered list of 1D tokens of which any prefix decodes, through a rectified flow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.flow import Guidance, RectifiedFlow, Sampling
from vistok.image import Preprocess
from vistok.layers.local_start import Start
from vistok.quantizers.base import Quantizer
from vistok.registry import preset, register
from vistok.tokenizers.base import Tokenizer, TokenizerOutput
from vistok.tokenizers.flextok_blocks import Size
from vistok.tokenizers.flextok_net import Condition, Ladder, RegisterEncoder, VelocityDecoder
from vistok.tokenizers.kl_vae import KLFrontend, PixelFrontend, Vae, resolve
from vistok.tokenizers.shape import check_1d
from vistok.tokens import Tokens

SizeName = Literal["d12", "d18", "d28"]
NestedDropout = Literal["uniform", "pow2", "uniform_pow2"]


SIZES = {f"d{n}": Size(width=64 * n, depth=n, heads=n) for n in (12, 18, 28)}


@register("tokenizer", "flextok")
class FlexTok(Tokenizer):
    """FlexTok (arXiv 2502.13967): registers, FSQ, nested dropout, rectified-flow decoder on latents or pixels.

    `forward` is the training pass: it draws noise and time, and gives no picture but the velocity; `extras` holds
    `velocity`, `x_t`, `t`, `noise`, `latents` and, with `repa_dim`, `repa` (B, h, w, repa_dim).

    Decoding is exact and does no needless work: masked tokens are the same vector and are computed once, with the
    logarithm of their number on the attention logit; time modulations are computed once for all steps; guided and
    unguided branches are one matrix. Noise is part of the answer: without a `generator`, every picture starts from the
    same fixed noise, so that decoding is a function of the tokens alone, whatever the batch.

    Where paper and released code leave it open (posterior sampling, law of t, null probability) the arguments have no
    claim to be the authors'.

    Args:
        image_size: Side in pixels, or (H, W); multiples of `patch_size` times the front end's factor.
        patch_size: Side of a patch of latents.
        num_tokens: Registers, K.
        encoder: `d12`, `d18`, `d28` or {width, depth, heads}.
        decoder: The same for the flow's network.
        quantizer: Any registered quantizer for 1D tokens; FlexTok's is FSQ with 64,000 ids.
        vae: Front end; None to work on pixels.
        table: (h, w) of the fixed position tables, the largest grid of patches; the grid of `image_size` if None.
        nested_dropout: Law of the lengths in training, see `draw_lengths`.
        learned_null: Whether the empty condition is a learnt vector.
        head_modulation: Whether time modulates the output layer.
        prediction: What the network gives, see `RectifiedFlow`; `velocity` in all released models.
        start: `published`: blocks and heads give nothing at first, as in the official code. `local`: they do, and
            tokens read and write places of the picture from the first step on, which short runs need (see
            `initialise`).
        repa_layer: Block whose patch features a REPA loss reads, counted from 0.
        repa_dim: Width of the REPA teacher; None for no projector (it is used in training alone).
        sampling: How tokens are decoded by default.

    Raises:
        ValueError: Sizes that do not fit together.

    Example:
        >>> tok = vistok.create("tokenizer", "flextok_d12_d12.in1k")
        >>> tok.decode(tok.encode("photo.jpg", 32), steps=20, guidance=7.5)
    """

    nested = True
    options = frozenset({"generator", "steps", "guidance", "noise"})
    decoder_parts = ("decoder", "repa")

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 256,
        patch_size: int = 2,
        num_tokens: int = 256,
        encoder: SizeName | Size = "d12",
        decoder: SizeName | Size = "d12",
        quantizer: Annotated[Spec, Of("quantizer")],
        vae: Vae | None = None,
        table: tuple[int, int] | None = None,
        nested_dropout: NestedDropout = "uniform",
        learned_null: bool = True,
        head_modulation: bool = True,
        prediction: Literal["velocity", "data"] = "velocity",
        start: Start = "published",
        repa_layer: int = 1,
        repa_dim: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__()
        self.frontend = self._front(vae)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.latent_shape = (self.frontend.channels, *self._latent_size(size, patch_size))
        grid = (self.latent_shape[1] // patch_size, self.latent_shape[2] // patch_size)
        table = grid if table is None else tuple(table)
        if grid[0] > table[0] or grid[1] > table[1]:
            raise ValueError(f"Pictures of {size[0]}x{size[1]} have {grid} patches and the position table {table}.")
        if num_tokens < 1 or (nested_dropout == "pow2" and num_tokens & (num_tokens - 1)):
            raise ValueError(f"num_tokens is at least 1, and a power of two for nested_dropout=pow2: {num_tokens}.")
        self.num_tokens, self.nested_dropout = num_tokens, nested_dropout
        self.preprocess = Preprocess(size=size, resample="bilinear")
        self.quantizer: Quantizer = create("quantizer", **quantizer)
        check_1d(self.quantizer, num_tokens)
        self.sampling = sampling or Sampling()
        self.flow = RectifiedFlow(prediction=prediction)
        shared = (self.frontend.channels, patch_size, table, num_tokens)
        one, two = (SIZES[s] if isinstance(s, str) else s for s in (encoder, decoder))
        if not 0 <= repa_layer < two.depth:
            raise ValueError(f"repa_layer is a block of the decoder, 0..{two.depth - 1}, got {repa_layer}.")
        self.encoder = RegisterEncoder(*shared, one, self.quantizer.in_dim)
        self.decoder = VelocityDecoder(
            *shared,
            self.quantizer.dim,
            two,
            learned_null=learned_null,
            head_modulation=head_modulation,
            read=repa_layer,
        )
        self.repa_dim = repa_dim
        self.repa = None if repa_dim is None else projector(two.width, repa_dim)
        initialise(self, start)

    def _front(self, vae: Vae | None) -> Any:
        if vae is None:
            return PixelFrontend()
        shape, weights = resolve(vae)
        plain = {k: v for k, v in dataclasses.asdict(shape).items() if k != "path"}
        self.__dict__["_recorded"]["vae"] = plain  # a saved tokenizer must not need the folder
        return KLFrontend(shape, weights)

    def _latent_size(self, size: tuple[int, ...], patch: int) -> tuple[int, int]:
        step = patch * self.frontend.factor
        if patch < 1 or size[0] % step or size[1] % step:
            raise ValueError(f"image_size {size[0]}x{size[1]} is not a multiple of {step} pixels, the side of a patch.")
        return size[0] // self.frontend.factor, size[1] // self.frontend.factor

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer."""
        return self.decoder.head.weight

    @property
    def patches(self) -> int:
        """Patches of a picture, P."""
        return self.latent_shape[1] * self.latent_shape[2] // self.decoder.patch**2

    def encode_features(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> (B, K, quantizer.in_dim), float32."""
        return self.encoder(self.frontend.encode(images))

    def _resized_state(self, other: Any) -> dict[str, Tensor]:
        own, wanted = self.state_dict(), other.state_dict()
        computed = [k for k in own if k.endswith("patch_embed.position")]  # tables are a function of their size
        return own | {k: wanted[k] for k in computed if own[k].shape != wanted[k].shape}

    # -- decoding ------------------------------------------------------------------------------------------------

    def decode_codes(
        self,
        codes: Tensor,
        *,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
        steps: int | None = None,
        guidance: float | Callable[[float], float] | Guidance | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Codes (B, N, quantizer.dim), N <= K -> pictures, unclamped. See `decode_latents`."""
        latents = self.decode_latents(
            codes, lengths=lengths, generator=generator, steps=steps, guidance=guidance, noise=noise
        )
        return self.frontend.decode(latents)

    @torch.no_grad()
    def decode_latents(
        self,
        codes: Tensor,
        *,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
        steps: int | None = None,
        guidance: float | Callable[[float], float] | Guidance | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample latents given codes.

        Args:
            codes: (B, N, quantizer.dim), N <= K.
            lengths: Tokens of each row that count, (B,), 0 for none; N if None.
            generator: Source of the noise, of the whole batch; without one every row gets the same fixed noise.
            steps: Sampling steps.
            guidance: A scale, a function of t, or a `vistok.flow` guidance.
            noise: Where to start, (B, C, h, w), instead.

        Returns:
            (B, C, h, w) float32.

        Raises:
            ValueError: Noise of another shape, or noise and a generator.
        """
        sampler, guide = self.sampling.build(steps), self.sampling.guide(guidance)
        noise = self.initial_noise(len(codes), generator, noise)
        condition = Condition(self.decoder, codes, lengths, sampler.evaluated, self.patches)
        return sampler(self.field(condition), noise, guide)

    @torch.no_grad()
    def decode_lengths(
        self,
        tokens: Tokens | Tensor,
        counts: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | Callable[[float], float] | Guidance | None = None,
        noise: Tensor | None = None,
    ) -> list[Tensor]:
        """As `Tokenizer.decode_lengths`, in one batch that shares what does not depend on the length (see `Ladder`)."""
        tokens = self.as_tokens(tokens)
        for k in counts:
            self.prefix(tokens, k)
        codes = self.tokens_to_codes(tokens)
        if not counts or codes.shape[1] < max(counts) or bool((tokens.lengths < max(counts)).any()):
            return super().decode_lengths(tokens, counts, steps=steps, guidance=guidance, noise=noise)
        sampler, guide = self.sampling.build(steps), self.sampling.guide(guidance)
        condition = Ladder(self.decoder, codes, counts, sampler.evaluated, self.patches)
        noise = self.initial_noise(len(codes), noise=noise).repeat(len(counts), 1, 1, 1)
        latents = sampler(self.field(condition), noise, guide)
        return [self.frontend.decode(part).float().clamp(0, 1) for part in latents.split(len(codes))]

    def initial_noise(
        self, batch: int, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Noise to start from, (B, C, h, w) float32; see `decode_latents`."""
        shape = (batch, *self.latent_shape)
        if noise is not None:
            if generator is not None or tuple(noise.shape) != shape:
                raise ValueError(f"Noise is {shape}, without a generator beside it; got {tuple(noise.shape)}.")
            return noise.to(self.device, torch.float32)
        if generator is not None:
            return torch.randn(shape, generator=generator, device=generator.device).to(self.device)
        fixed = torch.randn(shape[1:], generator=torch.Generator().manual_seed(0))
        return fixed.to(self.device).expand(shape)

    def field(self, condition: Callable[..., Sequence[Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
        """What samplers integrate: velocities of the branches at (x, t), float32."""

        def velocity(x: Tensor, t: float, branches: int = 1) -> tuple[Tensor, ...]:
            time = torch.full((len(x),), t, device=x.device)
            return tuple(self.flow.velocity(out.float(), x, time) for out in condition(x, t, branches))

        return velocity

    # -- training ------------------------------------------------------------------------------------------------

    def draw_lengths(self, uniform: Tensor) -> Tensor:
        """Lengths by the law of `nested_dropout`; see `nested_lengths`."""
        return nested_lengths(uniform, self.num_tokens, self.nested_dropout)

    def forward(
        self,
        images: Tensor,
        *,
        lengths: Tensor | None = None,
        t: Tensor | None = None,
        null: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        """The training pass.

        Args:
            images: Float in [0, 1], (B, 3, H, W).
            lengths: Tokens of each row that the decoder sees, (B,); all if None.
            t: Times of the flow, (B,); logit-normal draws if None.
            null: True for rows that train the empty condition, (B,); none if None.
            noise: (B, C, h, w); drawn if None.
            generator: Source of every draw.
        """
        latents = self.frontend.encode(images, generator)
        features = self.encoder(latents)
        quantized = self.quantizer(features, generator=generator)
        if noise is None:
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        t = self.flow.sample_t(len(latents), generator) if t is None else t
        t = t.to(latents.device, torch.float32)
        x_t = self.flow.add_noise(latents, noise, t)
        registers = self.decoder.registers(quantized.codes, lengths, null)
        out, seen = self.decoder(x_t, t, registers)
        extras = {"velocity": self.flow.velocity(out.float(), x_t, t), "x_t": x_t, "t": t}
        extras |= {"noise": noise, "latents": latents}
        if self.repa is not None:
            grid = (self.latent_shape[1] // self.decoder.patch, self.latent_shape[2] // self.decoder.patch)
            extras["repa"] = self.repa(seen).unflatten(1, grid)
        size = (images.shape[-2], images.shape[-1])
        tokens = Tokens(ids=quantized.ids, codes=quantized.codes, vocab=self.quantizer.vocab_sizes, size=size)
        return TokenizerOutput(images=None, tokens=tokens, quantized=quantized, extras=extras)


def nested_lengths(uniform: Tensor, num_tokens: int, mode: NestedDropout) -> Tensor:
    """Lengths of nested dropout from uniform numbers, one per picture (FlexTok's `size_sampling_mode`).

    `uniform`: every one of 1..K alike. `pow2`: 1, 2, 4, ..., K alike. `uniform_pow2`: uniform, then rounded up to a
    power of two (to K where that is more), so that half of the pictures keep more than half of the tokens.

    Args:
        uniform: Numbers in [0, 1), float64, (B,).
        num_tokens: K.
        mode: The law.

    Returns:
        int64, (B,).
    """
    if mode == "pow2":
        return 2 ** (uniform * num_tokens.bit_length()).long()
    lengths = 1 + (uniform * num_tokens).long()
    if mode == "uniform_pow2":
        powers = 2 ** torch.arange(num_tokens.bit_length() + 1, device=lengths.device)
        lengths = powers[torch.searchsorted(powers, lengths)].clamp_max(num_tokens)
    return lengths


def projector(width: int, out: int, ratio: int = 4) -> nn.Sequential:
    """REPA's projector: three linear layers with SiLU between (arXiv 2410.06940)."""
    hidden = ratio * width
    layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)]
    return nn.Sequential(*layers)


def initialise(model: FlexTok, start: Start = "published") -> None:
    """Xavier-uniform linear layers without bias; modulations are zero, and with a `published` start both heads.

    A `local` start is ours: gates are one; keys equal queries, and every register, in encoder and decoder, stands at
    the position of a patch of its own, in random order, so that it first reads and writes that patch; and noise enters
    at a tenth of its size, which leaves room for what the registers say.

    The projector stays Xavier-initialised: the official head class zeroes its last layer, where the cosine of the REPA
    loss is undefined.
    """
    parts = [model.encoder, model.decoder] + ([model.repa] if model.repa is not None else [])
    for part in parts:
        for name, layer in part.named_modules():
            if isinstance(layer, nn.Linear):
                head = layer in (model.encoder.head, model.decoder.head)
                silent = "modulation" in name or (head and start == "published")
                nn.init.zeros_(layer.weight) if silent else _xavier(layer, name)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    if start == "local":
        _start_local(model)


@torch.no_grad()
def _start_local(model: FlexTok) -> None:
    blocks = [*model.encoder.transformer.blocks, *model.decoder.transformer.blocks]
    for block in blocks:
        width = block.qkv.in_features
        block.qkv.weight[width : 2 * width] = block.qkv.weight[:width]
    for block in model.decoder.transformer.blocks:
        block.modulation[1].bias.unflatten(0, (2, 6, -1))[:, :2] = 1  # the gates of both kinds of tokens
    places = model.encoder.patch_embed.position.flatten(1).T  # (P, D)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    chosen = order.repeat(-(-model.num_tokens // len(order)))[: model.num_tokens]
    for registers in (model.encoder.registers, model.decoder.position):
        registers.copy_(places[chosen])
    model.decoder.patch_embed.proj.weight.mul_(0.1)


def _xavier(layer: nn.Linear, name: str) -> None:
    """Xavier-uniform, separately for the layers that are fused here and were single in the official code."""
    parts = 3 if name.endswith("qkv") else 2 if name.endswith("w12") else 1
    bound = math.sqrt(6 / (layer.in_features + layer.out_features / parts))
    nn.init.uniform_(layer.weight, -bound, bound)


_TINY = {"width": 64, "depth": 2, "heads": 2}
preset(
    "tokenizer",
    "flextok_tiny",
    builder="flextok",
    config={
        "image_size": 64,
        "patch_size": 8,
        "num_tokens": 16,
        "encoder": _TINY,
        "decoder": _TINY,
        "quantizer": {"name": "fsq", "levels": [8, 8, 8, 5, 5, 5]},
        "sampling": {"steps": 4, "guidance": 1.5},
    },
)
