"""One picture under one tokenizer: encoded once, decoded at any number of tokens, beside other codecs' files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vistok.evaluate.metric import Metric, build_metrics
from vistok.evaluate.rate_distortion import codec_candidates, smallest_file
from vistok.image import PictureError, to_pictures, to_pil, to_tensor, to_uint8
from vistok.tokenizers.base import Tokenizer
from vistok.tokens import Tokens, is_coded

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS = ("psnr", "ssim", "lpips_alex")
RIVALS = ("WebP", "JPEG", "AVIF")
GAIN = 3.0
"""How much stronger the residual is painted than it is."""
CURVE_POINTS, CURVE_LEAST, CURVE_SECONDS = 14, 5, 2.0


@dataclass(frozen=True, kw_only=True)
class Rival:
    """What another codec makes of as many bytes.

    Attributes:
        codec: Its name.
        size: Bytes of its file, 0 if there is none.
        picture: What its file decodes to, None if none is small enough.
        values: Metric -> value.
        note: Why there is no file.
    """

    codec: str
    size: int = 0
    picture: Image | None = None
    values: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class View:
    """A picture at one number of tokens.

    Attributes:
        count: Tokens.
        of: Tokens of the full code.
        size: Bytes of the whole file, None for continuous latents.
        raw: Bytes of the original's pixels.
        coded: Whether its ids are entropy-coded.
        original: The picture as preprocessed.
        reconstruction: What the tokens give.
        residual: What they leave out, grey where nothing is missing, `GAIN` times as strong.
        values: Metric -> value.
        rivals: The other codecs at the same bytes.
    """

    count: int
    of: int
    size: int | None
    raw: int
    coded: bool
    original: Image
    reconstruction: Image
    residual: Image
    values: dict[str, float]
    rivals: list[Rival]


class Viewer:
    """A tokenizer to look at pictures with.

    Args:
        tokenizer: Any tokenizer, in eval mode.
        name: What to call it.

    Attributes:
        skipped: Metrics that cannot be measured here -> why.
        least: Smallest number of tokens.
        most: Tokens of a full code.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.metrics, self.skipped = build_metrics(METRICS, size=tokenizer.preprocess.size)
        self.most = tokenizer.num_tokens
        self.least = 1 if tokenizer.nested else self.most

    @property
    def why_fixed(self) -> str:
        """Why the number of tokens cannot be chosen; empty if it can."""
        if self.tokenizer.nested:
            return ""
        return (
            f"{self.tokenizer.registry_name} always makes {self.most} tokens: it was not trained to decode fewer, so "
            "the slider is fixed. Nested tokenizers can."
        )

    @property
    def facts(self) -> str:
        """The tokenizer in one line."""
        height, width = self.tokenizer.preprocess.size
        parameters = sum(p.numel() for p in self.tokenizer.parameters()) / 1e6
        tokens = f"1 to {self.most} tokens" if self.tokenizer.nested else f"{self.most} tokens"
        coded = ", ids entropy-coded" if self.tokenizer.coder is not None else ""
        return f"{tokens}, {width} x {height} pixels, {parameters:.1f} M parameters{coded}"

    def look(self, picture: Any, caption: str = "") -> Look:
        """Encode a picture.

        Args:
            picture: A path or PIL picture.
            caption: For tokenizers that read text.

        Raises:
            FileNotFoundError: No such file.
            PictureError: No picture, damaged, or too large; the message says so in one line.
        """
        pixels = to_tensor(to_pil(picture), self.tokenizer.preprocess)
        text = caption or None if "text" in self.tokenizer.options else None
        return Look(self, pixels, self.tokenizer.encode(pixels, text=text))

    def measure(self, reconstruction: Tensor, original: Tensor) -> dict[str, float]:
        """Title of every metric -> value, of one picture each (1, 3, H, W)."""
        return {m.title: float(m.update(reconstruction, original)[0]) for m in self.metrics.values()}

    def metric(self, title: str) -> Metric:
        """The metric of that title."""
        return next(m for m in self.metrics.values() if m.title == title)


class Look:
    """An encoded picture. `at` decodes; what other codecs make of the picture is worked out once, when first needed."""

    def __init__(self, viewer: Viewer, pixels: Tensor, tokens: Tokens) -> None:
        self.viewer, self.pixels, self.tokens = viewer, pixels.cpu(), tokens
        self._rivals: dict[str, _Files] = {}

    @property
    def most(self) -> int:
        """Tokens of the full code."""
        return self.tokens.num_tokens

    def size(self, count: int) -> int | None:
        """Bytes of the whole file of so many tokens (the nearest possible number); None for continuous latents."""
        count = self._possible(count)
        return None if self.tokens.ids is None else len(self._file(count))

    def at(self, count: int) -> View:
        """Decode and measure at a number of tokens; beyond the possible ones the nearest is taken."""
        count = self._possible(count)
        rebuilt = self._decode(count)
        file = None if self.tokens.ids is None else self._file(count)
        return View(
            count=count,
            of=self.most,
            size=None if file is None else len(file),
            raw=self.pixels.numel(),
            coded=file is not None and is_coded(file),
            original=to_pictures(self.pixels)[0],
            reconstruction=to_pictures(rebuilt)[0],
            residual=to_pictures((0.5 + GAIN / 2 * (self.pixels - rebuilt)).clamp(0, 1))[0],
            values=self.viewer.measure(rebuilt, self.pixels),
            rivals=[] if file is None else [self._rival(codec, len(file)) for codec in RIVALS],
        )

    def curve(self) -> dict[str, list[tuple[int, float]]]:
        """PSNR against bytes: of the tokenizer at a few lengths, and of the codecs.

        At as many lengths as fit into `CURVE_SECONDS`, and at least `CURVE_LEAST`.
        Empty for continuous latents and for tokenizers of one length.
        """
        if self.tokens.ids is None or not self.viewer.tokenizer.nested or "PSNR" not in self._titles():
            return {}
        psnr, start, points = self.viewer.metric("PSNR"), time.perf_counter(), []
        for count in spread(self.most, CURVE_POINTS):
            points.append((self.size(count) or 0, float(psnr.update(self._decode(count), self.pixels)[0])))
            if len(points) >= CURVE_LEAST and time.perf_counter() - start > CURVE_SECONDS:
                break
        found = {self.viewer.name: rising(points)}
        largest = max(size for size, _ in points)
        for codec in RIVALS:
            found[codec] = self._files(codec).frontier(largest)
        return {name: line for name, line in found.items() if line}

    def _possible(self, count: float) -> int:
        return min(max(int(count), 1 if self.viewer.tokenizer.nested else self.most), self.most)

    def _titles(self) -> list[str]:
        return [m.title for m in self.viewer.metrics.values()]

    def _decode(self, count: int) -> Tensor:
        tokenizer = self.viewer.tokenizer
        noise: dict[str, Any] = {}
        if "generator" in tokenizer.options:  # the same noise whatever the length
            noise["generator"] = torch.Generator(tokenizer.device).manual_seed(0)
        return tokenizer.decode(
            tokenizer.prefix(self.tokens, count) if count < self.most else self.tokens, **noise
        ).cpu()

    def _file(self, count: int) -> bytes:
        tokens = self.tokens[:, :count] if count < self.most else self.tokens
        return self.viewer.tokenizer.to_bytes(tokens)

    def _files(self, codec: str) -> _Files:
        if codec not in self._rivals:
            self._rivals[codec] = _Files.of(self.pixels, codec, self.size(self.most) or 0)
        return self._rivals[codec]

    def _rival(self, codec: str, budget: int) -> Rival:
        files = self._files(codec)
        best = files.best(budget)
        if best is None:
            return Rival(
                codec=codec, note=files.note or f"has no file of {budget} bytes; its smallest is {files.least}"
            )
        size, _, array = best
        decoded = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
        values = self.viewer.measure(decoded, self.pixels)
        return Rival(codec=codec, size=size, picture=to_pictures(decoded)[0], values=values)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """All files of a codec for one picture, up to a size.

    Attributes:
        entries: (bytes, mean squared error, decoded), every quality and scale.
        least: Bytes of its smallest file.
        note: Why there are none at all.
    """

    entries: Sequence[tuple[int, float, np.ndarray]] = ()
    least: int = 0
    note: str = ""

    @classmethod
    def of(cls, pixels: Tensor, codec: str, largest: int) -> _Files:
        picture = to_uint8(pixels)[0].permute(1, 2, 0).numpy()
        try:
            least = smallest_file(picture, codec)
            found = codec_candidates(picture, codec, largest)
        except (OSError, KeyError) as err:
            return cls(note=f"cannot be written by this Pillow ({err})")
        wide = picture.astype(np.float32)
        return cls(entries=[(n, float(((x - wide) ** 2).mean()), x) for n, x in found], least=least)

    def best(self, budget: int) -> tuple[int, float, np.ndarray] | None:
        """The file of the highest PSNR among those of at most `budget` bytes."""
        return min((e for e in self.entries if e[0] <= budget), key=lambda e: e[1], default=None)

    def frontier(self, largest: int) -> list[tuple[int, float]]:
        """(bytes, PSNR) wherever more bytes give a better file."""
        fitting = [(size, error) for size, error, _ in self.entries if size <= largest]
        return rising([(size, float(10 * np.log10(255**2 / max(error, 1e-5)))) for size, error in fitting])


def rising(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Of points (bytes, quality) those better than all with as many bytes or fewer, in order."""
    line: list[tuple[int, float]] = []
    for size, quality in sorted(points, key=lambda p: (p[0], -p[1])):
        if not line or quality > line[-1][1]:
            line.append((size, quality))
    return line


def spread(most: int, points: int) -> list[int]:
    """Some numbers of 1..most, even on a logarithmic scale: the ends first, then ever finer, so that a few will do."""
    every = sorted({round(most ** (i / (points - 1))) for i in range(points)})
    order, step = [0, len(every) - 1], len(every)
    while step > 1:
        step = (step + 1) // 2
        order += range(0, len(every), step)
    return [every[i] for i in dict.fromkeys(order)]


__all__ = ["Look", "PictureError", "Rival", "View", "Viewer", "spread"]
