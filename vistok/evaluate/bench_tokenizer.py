"""`vistok bench tokenizer`: speed of encode and decode as ratios to a straightforward implementation, in one run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vistok
from vistok.evaluate.plain import PlainTiTok
from vistok.layers.transformer import Transformer
from vistok.tokenizers.titok import TiTok, TwoStageTiTok

BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class TokenizerBench:
    """Result of one benchmark run; times are medians in seconds per batch.

    Attributes:
        model: Preset or builder that was timed (random weights).
        batch: Pictures per batch.
        device: What it ran on.
        threads: CPU threads.
        rows: One per operation and precision: operation, precision, against what, seconds, against_seconds, ratio
            (median of the per-round ratios against / ours), images_per_s.
        equal_ids: Share of ids that bf16 encoding leaves equal to float32.
        peak_gflops: Measured matrix-multiplication peak, per precision.
        transformer_share: Share of that peak that the encoder's transformer reaches, per precision.
    """

    model: str
    batch: int
    device: str
    threads: int
    rows: list[dict[str, Any]]
    equal_ids: float
    peak_gflops: dict[str, float]
    transformer_share: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run(
    model: str = "titok_s128.in1k", *, batch: int = 2, rounds: int = 7, threads: int | None = None
) -> TokenizerBench:
    """Time a TiTok against the straightforward implementation with the same random weights.

    Ours and plain are timed in turn in every round, so that a machine that drifts changes both.

    Args:
        model: A preset of `titok` or `titok_two_stage`.
        batch: Pictures per batch.
        rounds: Timed rounds after one warm-up.
        threads: CPU threads; torch's own number if None.

    Raises:
        ValueError: Not a TiTok.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer = vistok.create("tokenizer", model).eval()
    if not isinstance(tokenizer, (TiTok, TwoStageTiTok)) or not tokenizer.quantizer.vocab_sizes:
        raise ValueError(f"The benchmark takes TiTok models with ids, and {model!r} is none. Try titok_s128.in1k.")
    plain = PlainTiTok(tokenizer).eval()
    images = torch.rand(batch, 3, *tokenizer.preprocess.size)
    ids = torch.randint(tokenizer.quantizer.vocab_sizes[0], (batch, tokenizer.num_tokens))
    with torch.inference_mode():
        rows = [
            _row(
                "encode", "float32", lambda: tokenizer.encode(images).ids, lambda: plain.encode(images), rounds, batch
            ),
            _row("decode", "float32", lambda: tokenizer.decode(ids), lambda: plain.decode(ids), rounds, batch),
            _row(
                "encode",
                "bf16",
                _bf16(lambda: tokenizer.encode(images).ids),
                lambda: tokenizer.encode(images).ids,
                rounds,
                batch,
            ),
            _row("decode", "bf16", _bf16(lambda: tokenizer.decode(ids)), lambda: tokenizer.decode(ids), rounds, batch),
        ]
        equal = (_bf16(lambda: tokenizer.encode(images).ids)() == tokenizer.encode(images).ids).float().mean()
        peaks, shares = {}, {}
        for name, dtype in (("float32", torch.float32), ("bf16", BF16)):
            peaks[name], shares[name] = _transformer_share(tokenizer, batch, dtype, rounds)
    return TokenizerBench(
        model=model,
        batch=batch,
        device=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        rows=rows,
        equal_ids=float(equal),
        peak_gflops=peaks,
        transformer_share=shares,
    )


def time_in_turn(ours: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both and the median of the per-round ratios other / ours, after one warm-up of each."""
    ours(), other()
    pairs = []
    for _ in range(rounds):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        other()
        pairs.append((middle - start, time.perf_counter() - middle))
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def _row(
    operation: str, precision: str, ours: Callable[[], Tensor], other: Callable[[], Tensor], rounds: int, batch: int
) -> dict[str, Any]:
    seconds, reference, ratio = time_in_turn(ours, other, rounds)
    against = "plain float32" if precision == "float32" else "ours float32"
    return {
        "operation": operation,
        "precision": precision,
        "against": against,
        "seconds": seconds,
        "against_seconds": reference,
        "ratio": ratio,
        "images_per_s": batch / seconds,
    }


def _bf16(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def wrapped() -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return call()

    return wrapped


def matmul_peak(dtype: torch.dtype, rounds: int = 5) -> float:
    """Best GFLOP/s of square matrix products of 1024 to 3072."""
    best = 0.0
    for n in (1024, 2048, 3072):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        for _ in range(rounds):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def transformer_flops(transformer: Transformer, n: int, rows: int) -> float:
    """Floating-point operations (2 per multiply-add) of one sequence of n tokens whose last block gives `rows`."""
    blocks: nn.ModuleList = transformer.blocks
    total = 0.0
    for i, block in enumerate(blocks):
        dim, hidden = block.norm1.normalized_shape[0], block.mlp.fc1.out_features  # type: ignore[union-attr,index]
        m = rows if i == len(blocks) - 1 else n
        total += 2 * dim * dim * (2 * n + 2 * m) + 4 * m * n * dim + 4 * m * dim * hidden
    return total


def _transformer_share(
    tokenizer: TiTok | TwoStageTiTok, batch: int, dtype: torch.dtype, rounds: int
) -> tuple[float, float]:
    """(peak GFLOP/s, share of it that the encoder's transformer reaches); peak and model are timed in turn."""
    transformer = tokenizer.encoder.transformer
    n, rows = tokenizer.encoder.position.shape[0] + tokenizer.num_tokens, tokenizer.num_tokens
    x = torch.randn(batch, n, tokenizer.encoder.position.shape[1])

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=BF16, enabled=dtype == BF16):
            return transformer(x, rows=slice(n - rows, None))

    forward()
    flops = batch * transformer_flops(transformer, n, rows) / 1e9
    peak, shares = 0.0, []
    for _ in range(rounds):
        now = matmul_peak(dtype, rounds=1)
        peak = max(peak, now)
        start = time.perf_counter()
        forward()
        shares.append(flops / (time.perf_counter() - start) / now)
    return peak, statistics.median(shares)
