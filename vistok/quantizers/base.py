"""What every quantizer is and returns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vistok.distributed import all_sum, world_size
from vistok.quantizers.usage import UsageTracker

LOSS_TERMS = ("codebook", "commitment", "index", "entropy_sample", "entropy_batch", "saturation", "kl")
MAX_ID_BITS = 63


@dataclass(frozen=True)
class Quantized:
    """Result of a quantizer.

    Attributes:
        codes: Quantised vectors with a straight-through gradient, float32, (B, N, D).
        ids: Token ids, int64, (B, N) or (B, N, G) for grouped codes; None for continuous latents.
        losses: Scalar loss terms, unweighted, under the names in `LOSS_TERMS`.
        stats: Detached figures worth logging: usage, perplexity, dead_age, bit_balance over a sliding window.
        loss: Sum of the terms under the quantizer's `weights`, a scalar (0 if it has none).
    """

    codes: Tensor
    ids: Tensor | None
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]
    loss: Tensor


class Positions:
    """Which positions of a batch count, and means over them.

    While training with several processes a mean is divided by the *average* number of counted positions per process,
    so that the average of the processes' losses (and, under DDP, of their gradients) is that of the joint batch, also
    when masks or last batches are of unequal size. Evaluation never communicates.

    Attributes:
        mask: True where a position counts, (B, N), or None for all.
        synced: Whether means are over several processes.
    """

    def __init__(self, z: Tensor, mask: Tensor | None, *, synced: bool) -> None:
        self.mask = mask
        self.synced = synced and world_size() > 1
        self._z = z.detach()

    @functools.cached_property
    def _sizes(self) -> Tensor:
        own = self._z.new_tensor([self._z.shape[0] * self._z.shape[1], self._z.shape[0]])
        if self.mask is not None:
            own[0] = self.mask.sum()
        return all_sum(own) / world_size() if self.synced else own

    @property
    def count(self) -> Tensor:
        """Counted positions, averaged over the processes while training, a scalar."""
        return self._sizes[0]

    @property
    def batch(self) -> Tensor:
        """Batch size, averaged over the processes while training, a scalar."""
        return self._sizes[1]

    def select(self, x: Tensor) -> Tensor:
        """X (B, N) or (B, N, ...) with zeros where a position does not count."""
        if self.mask is None:
            return x
        return torch.where(self.mask.reshape(*self.mask.shape, *(1,) * (x.ndim - 2)), x, x.new_zeros(()))

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x (B, N) or (B, N, ...) over the counted positions (and all channels); 0 if none counts."""
        if self.mask is None and not self.synced:
            return x.mean() if x.numel() else x.sum()
        channels = math.prod(x.shape[2:])
        return self.select(x).sum() / (self.count * channels).clamp_min(1e-6)

    def per_sample(self, x: Tensor) -> Tensor:
        """Sum of x (B, N) over the counted positions, mean over the batch; 0 for an empty batch."""
        return self.select(x).sum() / self.batch.clamp_min(1e-6)

    def flat(self) -> Tensor | None:
        """The mask as (B * N,), or None."""
        return None if self.mask is None else self.mask.reshape(-1)


class Quantizer(nn.Module):
    """Base of all quantizers: float32 inside, channels last, one result type.

    A subclass sets the attributes below in its constructor and implements `quantize`, `ids_to_codes` and
    `codes_to_ids`. In training mode `forward` may update statistics and, if torch.distributed is initialised,
    communicates: all processes have to call it. In evaluation mode it changes no state and never communicates.
    A quantizer of continuous latents (`vocab_sizes` is ()) has `mode(z)` and `draw(z, generator)` besides.

    Attributes:
        dim: Channels of the codes, D.
        in_dim: Channels of the features it takes; `dim` unless said otherwise (2 * dim for a Gaussian).
        vocab_sizes: Number of ids per group, () for continuous latents.
        weights: Weight of each loss term in `Quantized.loss`; the published defaults. A step may set them.
        usage: Sliding-window statistics of the ids seen in training; None switches them off. Not part of the state.
    """

    def __init__(self, dim: int, vocab_sizes: tuple[int, ...], *, in_dim: int | None = None) -> None:
        super().__init__()
        self.dim = require_positive("dim", dim)
        self.in_dim = dim if in_dim is None else require_positive("in_dim", in_dim)
        for size in vocab_sizes:
            if not 1 <= size <= 2**MAX_ID_BITS:
                raise ValueError(
                    f"{type(self).__name__} was asked for {size:.4g} ids per token and an int64 id holds at most 2^63. "
                    f"Split the token into groups, one id each."
                )
        self.vocab_sizes = vocab_sizes
        self.weights: dict[str, float] = {}
        self.usage: UsageTracker | None = UsageTracker(vocab_sizes) if vocab_sizes else None

    @property
    def bits(self) -> float:
        """Bits per token, the sum of log2 of the group vocabularies."""
        return float(sum(math.log2(v) for v in self.vocab_sizes))

    def num_ids(self, n: int, grid: tuple[int, int] | None = None) -> int:
        """Ids that `n` feature positions become (differs from `n` only for multi-scale quantizers)."""
        return n

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """Quantise features; float32 with autocast off whatever comes in.

        Args:
            z: Features, (B, N, in_dim), any floating dtype.
            mask: True where a position counts, (B, N); the others vote for no loss and no statistic.
            grid: (h, w) with h * w = N, used by multi-scale quantizers only.
            generator: Source of every random draw, on the device of z.

        Raises:
            ValueError: Wrong rank, channel count, dtype, mask or grid.
        """
        self._check_features(z, mask, grid)
        with torch.autocast(z.device.type, enabled=False), full_precision_matmul():
            z = z.float()
            out = self.quantize(z, Positions(z, mask, synced=self.training), grid, generator)
        if self.training and self.usage is not None and out.ids is not None:
            counted = mask if mask is not None and out.ids.shape[:2] == mask.shape else None
            out = dataclasses.replace(out, stats={**out.stats, **self.usage.update(out.ids, counted)})
        return out

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """The algorithm itself, on float32 features (B, N, in_dim). See `forward`."""
        raise NotImplementedError

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes of ids: (B, N) or (B, N, G) int64 -> (B, N, D) float32."""
        raise NotImplementedError

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids of codes, exact inverse of `ids_to_codes`: (B, N, D) -> int64 (B, N) or (B, N, G)."""
        raise NotImplementedError

    def result(self, codes: Tensor, ids: Tensor | None, losses: dict[str, Tensor]) -> Quantized:
        """Bundle codes, ids and unweighted loss terms; adds the weighted sum."""
        total = codes.new_zeros(())
        for name, term in losses.items():
            weight = self.weights.get(name, 0.0)
            if weight:
                total = total + weight * term
        return Quantized(codes=codes, ids=ids, losses=losses, stats={}, loss=total)

    def grouped(self, ids: Tensor) -> Tensor:
        """Ids with a group dimension in any case: (B, N) or (B, N, G) -> (B, N, G)."""
        return ids.unsqueeze(-1) if len(self.vocab_sizes) == 1 else ids

    def ungrouped(self, ids: Tensor) -> Tensor:
        """Ids as the interface has them: (B, N, G) -> (B, N) where G is 1, else (B, N, G)."""
        return ids.squeeze(-1) if len(self.vocab_sizes) == 1 else ids

    def check_ids(self, ids: Tensor) -> Tensor:
        """The ids as int64, after checking shape and range.

        Raises:
            ValueError: Not integers, wrong number of groups, or an id outside its vocabulary.
        """
        groups = len(self.vocab_sizes)
        shape = "(B, N)" if groups == 1 else f"(B, N, {groups})"
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{type(self).__name__} takes integer ids {shape} and got {ids.dtype}.")
        if ids.ndim < 1 or (groups != 1 and ids.shape[-1] != groups):
            raise ValueError(f"{type(self).__name__} takes ids {shape} and got {tuple(ids.shape)}.")
        return self._check_range(ids.long())

    def _check_range(self, ids: Tensor) -> Tensor:
        if not ids.numel():
            return ids
        # the largest id, not the size: 2^63 itself is no int64
        top = torch.tensor([v - 1 for v in self.vocab_sizes], dtype=torch.int64, device=ids.device)
        if bool(((self.grouped(ids) < 0) | (self.grouped(ids) > top)).any()):
            raise ValueError(
                f"{type(self).__name__} has ids 0 .. {', '.join(str(v - 1) for v in sorted(set(self.vocab_sizes)))} "
                f"and got values from {int(ids.min())} to {int(ids.max())}. "
                f"Take the offset of special or text tokens off before decoding."
            )
        return ids

    def check_codes(self, codes: Tensor) -> Tensor:
        """The codes as float32, after checking their width.

        Raises:
            ValueError: Last dimension is not `dim`.
        """
        if codes.ndim < 1 or codes.shape[-1] != self.dim:
            raise ValueError(f"{type(self).__name__} has codes (B, N, {self.dim}) and got {tuple(codes.shape)}.")
        return codes.float()

    def _check_features(self, z: Tensor, mask: Tensor | None, grid: tuple[int, int] | None) -> None:
        if z.ndim != 3 or z.shape[-1] != self.in_dim:
            raise ValueError(
                f"{type(self).__name__} takes features (B, N, {self.in_dim}) and got {tuple(z.shape)}. "
                f"Channels are last; set the quantizer's dim to the width of the encoder's output."
            )
        if not z.is_floating_point():
            raise ValueError(f"{type(self).__name__} takes floating-point features and got {z.dtype}.")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != z.shape[:2]):
            raise ValueError(
                f"mask says with True which positions count: a bool tensor {tuple(z.shape[:2])}, "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        if grid is not None and grid[0] * grid[1] != z.shape[1]:
            raise ValueError(
                f"grid {tuple(grid)} has {grid[0] * grid[1]} positions and the features have {z.shape[1]}."
            )


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """Exactly q in value, the identity from z in gradient (Bengio et al. 2013, arXiv 1308.3432).

    The usual z + sg(q - z) equals q only to one unit in the last place; this form has no rounding error.
    """
    return q.detach() + (z - z.detach())


def require_positive(name: str, value: int) -> int:
    """The value, if it is a whole number of at least 1.

    Raises:
        ValueError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return value


@contextlib.contextmanager
def full_precision_matmul() -> Iterator[None]:
    """Switch TF32 and bf16 matrix products off: rounding to 10 bits would change ids. Undone on leaving."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
