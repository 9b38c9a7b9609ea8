"""What every visual tokenizer is: `encode`, `decode`, `forward`, and how it is saved."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok import hub
from vistok.codec.prior import Prior, available
from vistok.config import create
from vistok.image import to_tensor
from vistok.quantizers.base import Quantized
from vistok.tokenizers.sizes import Sized
from vistok.tokenizers.text import captions_of, one_per_picture
from vistok.tokens import Tokens, to_bytes


@dataclass(frozen=True)
class TokenizerOutput:
    """What a tokenizer's `forward` gives to a training step.

    Attributes:
        images: Reconstruction, unclamped, (B, 3, H, W); None for models trained without pixels.
        tokens: The tokens, with codes that carry the gradient.
        quantized: The quantizer's result with its loss terms; None without a quantizer.
        extras: Whatever else a loss of this system needs (features, logits), named in the class docstring.
    """

    images: Tensor | None
    tokens: Tokens
    quantized: Quantized | None
    extras: dict[str, Tensor] = field(default_factory=dict)


class Tokenizer(Sized):
    """Base of all tokenizers.

    A subclass builds its `quantizer` in the constructor, sets `preprocess` and `num_tokens`, and implements
    `encode_features` and `decode_codes`; everything users touch is here.

    Attributes:
        nested: Whether any prefix of the tokens is a valid shorter code. `decode_codes` of such a tokenizer takes
            `lengths` (B,), which it gets where the rows of a batch differ; what lies beyond a row's length must not
            matter. Otherwise it gets fewer codes, (B, k, quantizer.dim).
        options: Names of the optional arguments of `encode`/`decode` that this tokenizer understands, out of
            `text`, `size`, `generator`, `steps`, `guidance`, `noise`. `sample` is understood by all with continuous
            latents.
        multiple: See `Sized`; sides of pictures of any size are padded to multiples of it. None for one size only.
        decoder_parts: Names of submodules and parameters that only decoding uses; the model id leaves them out.
        preprocess: How pictures become its input.
        quantizer: The quantizer.
        num_tokens: Tokens per picture of the preprocessed size, K.
        probe_point: Where its authors probe it for classes, see `vistok.evaluate.probe`.
        prior: What entropy coding of the ids goes by (`prior.npz` beside the weights), None if there is none.
    """

    nested: bool = False
    prior: Prior | None = None
    num_tokens: int
    probe_point: ClassVar[str] = "features"

    # -- what a subclass implements ------------------------------------------------------------------------------

    def encode_features(self, images: Tensor, **options: Any) -> Tensor:
        """Pictures in [0, 1], (B, 3, H, W) -> features for the quantizer, float32, (B, N, quantizer.in_dim).

        `options` holds `text` for the classes that list it in `options`: B captions, features (B, L, D), or None.
        """
        raise NotImplementedError

    def decode_codes(self, codes: Tensor, **options: Any) -> Tensor:
        """Codes (B, N, quantizer.dim) -> pictures around [0, 1], unclamped, (B, 3, H, W).

        `options` holds `grid` for tokens on a grid, `lengths` (see `nested`), `text` as for `encode_features`, and the
        other options of `decode` that the class lists in `options`.
        """
        raise NotImplementedError

    # -- what users call -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Any, num_tokens: int | None = None, *, text: Any = None, sample: bool = False) -> Tokens:
        """Turn pictures into tokens.

        Args:
            images: Float tensor in [0, 1] or uint8, (B, 3, H, W); PIL pictures; paths; or a list of these.
            num_tokens: Keep only this many tokens of each row (nested tokenizers only).
            text: Captions, one per picture or one for all, for tokenizers that read them; also features (B, L, D).
                Captions go along with the tokens.
            sample: Draw from the posterior instead of taking its mode (continuous latents only).

        Raises:
            ValueError: A tensor of the wrong size or range, an option this tokenizer does not have, or more tokens
                than it makes.

        Example:
            >>> tokens = tokenizer.encode("photo.jpg")      # Tokens(1 x 128 tokens, 12 bits each)
        """
        self._refuse(text=text, sample=sample or None)
        batch = to_tensor(images, self.preprocess, any_size=self.multiple is not None).to(self.device)
        tokens = self._encode(batch, sample=sample, **self._text_option(text, len(batch)))
        return tokens if num_tokens is None else self.prefix(tokens, num_tokens)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Tensor,
        *,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Turn tokens, or plain ids (B, N[, G]), into pictures in [0, 1], (B, 3, H, W).

        Args:
            tokens: Tokens of this model, or int64 ids. A nested tokenizer takes fewer than it makes, also rows of
                different `lengths` in one padded batch.
            text: As for `encode`; the captions that came with the tokens if None.
            size: (H, W) of the picture, for tokenizers that decode to several sizes; that of `tokens` if they know it.
            generator: Source of noise, for generative decoders.
            steps: Sampling steps, for generative decoders.
            guidance: Guidance scale, for generative decoders.
            noise: The noise itself instead of its source, for generative decoders.

        Raises:
            ValueError: Ids outside the vocabulary, the wrong number of tokens, or an option it does not have.
        """
        given = {"text": text, "generator": generator, "steps": steps, "guidance": guidance, "noise": noise}
        self._refuse(size=size, **given)
        target, lengths = self.target_size(tokens, size), None
        if isinstance(tokens, Tokens):
            lengths = tokens.lengths
            text = tokens.text if text is None and "text" in self.options else text
        codes = self.tokens_to_codes(tokens, target)
        codes, short = self._shortened(codes, lengths if self.nested else None)
        kept = {k: v for k, v in given.items() if v is not None} | self._text_option(text, len(codes))
        rebuilt = self.decode_codes(codes, **kept, **short, **self._place(target))
        return self._cropped(rebuilt, target).float().clamp(0, 1)

    def decode_lengths(self, tokens: Tokens | Tensor, counts: Sequence[int], **options: Any) -> list[Tensor]:
        """Decode the same tokens at several lengths; a generative decoder starts from the same noise each time.

        Args:
            tokens: Tokens of this model, or int64 ids.
            counts: Tokens to keep of every row.
            **options: As for `decode`; noise, in place of a generator.

        Returns:
            Pictures (B, 3, H, W) for each count, what `decode` gives for `tokens[:, :k]`.

        Raises:
            ValueError: As for `decode` and `prefix`.
        """
        return [self.decode(self.prefix(self.as_tokens(tokens), k), **options) for k in counts]

    def forward(
        self,
        images: Tensor,
        *,
        lengths: Tensor | None = None,
        text: Any = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        """Encode, quantise and decode for training; the reconstruction is not clamped.

        Args:
            images: Float in [0, 1], (B, 3, H, W).
            lengths: Tokens of each row that decoding may use, (B,), see `draw_lengths`; all if None. Nested only.
            text: As for `encode`.
            generator: Source of every random draw.
        """
        option, size = self._text_option(text, len(images)), (images.shape[-2], images.shape[-1])
        tokens, quantized = self.tokenize(images, generator=generator, **option)
        codes, short = self._shortened(quantized.codes, lengths)
        noise = {"generator": generator} if "generator" in self.options else {}
        rebuilt = self._cropped(self.decode_codes(codes, **option, **short, **noise, **self._place(size)), size)
        return TokenizerOutput(images=rebuilt, tokens=tokens, quantized=quantized)

    def tokenize(
        self, images: Tensor, *, text: Any = None, generator: torch.Generator | None = None
    ) -> tuple[Tokens, Quantized]:
        """Encode and quantise a batch (B, 3, H, W) in [0, 1]; the tokens' codes carry the gradient."""
        size, option = (images.shape[-2], images.shape[-1]), self._text_option(text, len(images))
        grid = self.grid_for(size)
        quantized = self.quantizer(self.encode_features(images, **option), grid=grid, generator=generator)
        return self.tokens_of(quantized, size, captions_of(option)), quantized

    def tokens_of(self, quantized: Quantized, size: tuple[int, int], text: tuple[str, ...] | None = None) -> Tokens:
        """Tokens of pictures of `size` (H, W) from what the quantizer made of their features."""
        aligned = quantized.ids is None or quantized.ids.shape[1] == quantized.codes.shape[1]
        return Tokens(
            ids=quantized.ids,
            codes=quantized.codes if aligned else None,  # ids of several scales are more than the codes
            grid=self.token_grid(size),
            vocab=self.quantizer.vocab_sizes,
            size=size,
            text=text,
        )

    def draw_lengths(self, uniform: Tensor) -> Tensor:
        """Lengths that a nested tokenizer trains with: every one of 1..K alike (tail token drop, arXiv 2501.10064).

        Args:
            uniform: Independent numbers in [0, 1), float64, one per picture (B,).

        Returns:
            int64, (B,).
        """
        return 1 + (uniform * self.num_tokens).long()

    def save_pretrained(self, folder: str | Path) -> Path:
        """See `hub.Saveable.save_pretrained`; the prior goes along."""
        found = super().save_pretrained(folder)
        if self.prior is not None:
            self.prior.save(found)
        return found

    @property
    def coder(self) -> Prior | None:
        """The prior, if the range coder that it is for is installed."""
        return self.prior if self.prior is not None and available() else None

    def portable(self, tokens: Tokens) -> Tokens:
        """Tokens without what the model knows anyway: the size of the picture, if it takes one size only."""
        known = self.multiple is None and tokens.size == tuple(self.preprocess.size)
        return dataclasses.replace(tokens, size=None) if known else tokens

    def to_bytes(self, tokens: Tokens, *, coded: bool = True) -> bytes:
        """One picture's tokens as a `.vtok` file of this model; see `vistok.tokens.to_bytes`.

        Args:
            tokens: Of one picture, with ids.
            coded: Entropy-code the ids where that is smaller, if the model has a prior (`coder`).
        """
        return to_bytes(self.portable(tokens), self.model_id, self.coder if coded else None)

    # -- parts ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are (or the buffers, of a tokenizer without parameters)."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    def resized(self, size: tuple[int, int]) -> Tokenizer:
        """The same weights for pictures of another size.

        Args:
            size: (H, W) in pixels. Quality at sizes never trained is not guaranteed.

        Returns:
            A new tokenizer on the same device and of the same precision; this one is unchanged.

        Raises:
            ValueError: A size the model cannot take, or a model of one size only.
        """
        if "image_size" not in self.config:
            raise ValueError(f"{self.registry_name} takes pictures of one size only.")
        other: Any = create(self.registry_kind, self.registry_name, **{**self.config, "image_size": tuple(size)})
        hub.load_strictly(other, self._resized_state(other), f"{self.registry_name} at {size[0]}x{size[1]}")
        other.preprocess = dataclasses.replace(self.preprocess, size=other.preprocess.size)
        return other.to(self.device, next(self.parameters()).dtype).train(self.training)

    def start_from(self, other: Tokenizer, source: str) -> None:
        """Take the weights of a model that a recipe starts from (`train.init_from`), strictly.

        A subclass says here how a later stage of training may differ from the one before.

        Raises:
            LoadError: Weights that do not fit.
        """
        hub.load_strictly(self, other.state_dict(), source)

    def _resized_state(self, other: Any) -> dict[str, Tensor]:
        """This model's state dict for `other`, which has another picture size; position tables are interpolated."""
        return self.state_dict()

    def prefix(self, tokens: Tokens, k: int) -> Tokens:
        """The first k tokens of every row; see `check_count`."""
        self.check_count(k)
        return tokens[:, :k]

    def check_count(self, k: int) -> None:
        """Refuse a number of tokens per picture that this tokenizer cannot be cut to.

        Raises:
            ValueError: More than it makes, or fewer of a tokenizer that is not nested.
        """
        if not 1 <= k <= self.num_tokens:
            raise ValueError(f"num_tokens is 1..{self.num_tokens} for this tokenizer, got {k}.")
        if k < self.num_tokens and not self.nested:
            raise ValueError(
                f"{self.registry_name} always makes {self.num_tokens} tokens: it was not trained to decode fewer. "
                "Nested tokenizers can; see `vistok list tokenizer`."
            )

    def check_tokens(self, tokens: Tokens) -> None:
        """Refuse tokens that this model cannot decode.

        Raises:
            ValueError: Another vocabulary, ids outside it, codes of another width, or the wrong number of tokens.
        """
        if tokens.ids is not None:
            self._check_ids(tokens.ids)
            if tokens.vocab and tokens.vocab != self.quantizer.vocab_sizes:
                raise ValueError(
                    f"{self.registry_name} has a vocabulary of {self.quantizer.vocab_sizes} and got tokens of another "
                    f"model, with {tokens.vocab}."
                )
        elif tokens.codes is not None and tokens.codes.shape[-1] != self.quantizer.dim:
            raise ValueError(
                f"{self.registry_name} decodes codes of {self.quantizer.dim} channels, got {tokens.codes.shape[-1]}."
            )
        self._check_length(tokens)

    def as_tokens(self, tokens: Tokens | Tensor, size: tuple[int, int] | None = None) -> Tokens:
        """Tokens as they are, plain ids of pictures of `size` (the preprocessed one if None) as tokens of this model.

        Raises:
            ValueError: Ids outside the vocabulary or of another shape.
            TypeError: Neither.
        """
        if isinstance(tokens, Tensor):
            size = size or self.preprocess.size
            self._check_ids(tokens)
            self._check_count(tokens.shape[1], size)
            vocab, grid = self.quantizer.vocab_sizes, self.token_grid(size)
            return Tokens(ids=tokens.to(torch.int64), vocab=vocab, grid=grid, size=size)
        if not isinstance(tokens, Tokens):
            raise TypeError(f"Decode takes Tokens or a tensor of ids, got {type(tokens).__name__}.")
        return tokens

    def tokens_to_codes(self, tokens: Tokens | Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Checked tokens, or ids as in `as_tokens`, -> codes (B, N, D)."""
        tokens = self.as_tokens(tokens, size)
        self.check_tokens(tokens)
        tokens = tokens.to(self.device)
        if tokens.ids is None:
            assert tokens.codes is not None
            return tokens.codes
        return self.quantizer.ids_to_codes(tokens.ids, grid=tokens.grid)  # type: ignore[arg-type]

    def _encode(self, batch: Tensor, *, sample: bool, **option: Any) -> Tokens:
        if not self.quantizer.vocab_sizes:
            return self._encode_continuous(batch, sample=sample, **option)
        return self.tokenize(batch, **option)[0]

    def _encode_continuous(self, batch: Tensor, *, sample: bool, **option: Any) -> Tokens:
        size = (batch.shape[-2], batch.shape[-1])
        features = self.encode_features(batch, **option)
        latent: Any = self.quantizer  # continuous quantizers have both, whatever the mode
        codes = latent.draw(features) if sample else latent.mode(features)
        return Tokens(ids=None, codes=codes, grid=self.grid_for(size), size=size, text=captions_of(option))

    def _text_option(self, text: Any, batch: int) -> dict[str, Any]:
        """`{"text": ...}` for `encode_features` and `decode_codes` of a tokenizer that reads text, else nothing."""
        self._refuse(text=text)
        return {"text": one_per_picture(text, batch)} if "text" in self.options else {}

    def _shortened(self, codes: Tensor, lengths: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes (B, N, D) cut to the longest row, and `lengths` for `decode_codes` if rows differ."""
        if lengths is None or not len(lengths):
            return codes, {}
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 1 or longest > codes.shape[1] or (shortest < codes.shape[1] and not self.nested):
            allowed = f"1..{codes.shape[1]}" if self.nested else f"always {codes.shape[1]}"
            raise ValueError(f"Lengths of {self.registry_name} are {allowed}, got {shortest}..{longest}.")
        return codes[:, :longest], {} if shortest == longest else {"lengths": lengths.to(codes.device)}

    def _check_ids(self, ids: Tensor) -> None:
        vocab = self.quantizer.vocab_sizes
        if not vocab:
            raise ValueError(f"{self.registry_name} has continuous latents and no ids: decode Tokens with codes.")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"Ids are integers, got {ids.dtype}. Continuous latents are decoded as Tokens(ids=None, codes=...)."
            )
        if ids.ndim != (2 if len(vocab) == 1 else 3) or (ids.ndim == 3 and ids.shape[-1] != len(vocab)):
            want = "(B, N)" if len(vocab) == 1 else f"(B, N, {len(vocab)})"
            raise ValueError(f"Ids of {self.registry_name} are {want}, got {tuple(ids.shape)}.")
        top = torch.tensor([v - 1 for v in vocab], device=ids.device)  # the size itself, 2^63, may be no int64
        found = self.quantizer.grouped(ids)
        if ids.numel() and bool(((found < 0) | (found > top)).any()):
            raise ValueError(
                f"Ids of {self.registry_name} are 0..{max(vocab) - 1}, got {int(ids.min())}..{int(ids.max())}."
            )

    def _check_length(self, tokens: Tokens) -> None:
        n, full = tokens.num_tokens, self.num_tokens if tokens.grid is None else math.prod(tokens.grid)
        if not len(tokens):
            raise ValueError("The batch is empty.")
        short = n < full or bool((tokens.lengths < n).any())
        if n > full or n < 1 or (short and not self.nested):
            allowed = f"1..{full}" if self.nested else f"exactly {full}"
            raise ValueError(
                f"{self.registry_name} decodes {allowed} tokens per picture and got {n} "
                f"(lengths {tokens.lengths.tolist()[:4]})."
            )

    def _refuse(self, **given: Any) -> None:
        for name, value in given.items():
            if name == "sample" and not self.quantizer.vocab_sizes:
                continue
            if value is not None and name not in self.options:
                has = ", ".join(sorted(self.options)) or "no options"
                hint = " Leave the caption out." if name == "text" else ""
                raise ValueError(f"{self.registry_name} has no option {name!r}; it has {has}.{hint}")
