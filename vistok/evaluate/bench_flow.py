"""`vistok bench tokenizer` for FlexTok: the flow sampler against a plain batched and a packed implementation."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import vistok
from vistok.evaluate.plain_flextok import decode_batched, decode_packed
from vistok.registry import registry
from vistok.tokenizers.flextok import FlexTok

PACKED = "packed"
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class FlowBench:
    """Result of one benchmark run; seconds are process CPU time per batch, medians over the rounds.

    Attributes:
        model: Preset or builder that was timed (random weights, nothing left at zero).
        batch: Pictures per batch.
        steps: Sampling steps, the same for all.
        guidance: Guidance scale; both branches run.
        width: Width of the decoder.
        threads: CPU threads.
        device: What it ran on.
        rows: One per number of tokens: tokens, seconds, plain_seconds, plain_ratio, difference (largest, to plain), and
            packed_seconds and packed_ratio where that layout was timed. Ratios are medians of the rounds' ratios.
    """

    model: str
    batch: int
    steps: int
    guidance: float
    width: int
    threads: int
    device: str
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def takes(model: str) -> bool:
    """Whether a preset or builder is a FlexTok."""
    return registry("tokenizer").resolve(model)[1] is FlexTok


def run(
    model: str = "flextok_d8_d8",
    *,
    batch: int = 8,
    tokens: Sequence[int] = (8, 32, 64),
    steps: int = 2,
    rounds: int = 3,
    threads: int = 1,
    packed: bool = True,
) -> FlowBench:
    """Time guided sampling of latents (without the autoencoder), ours and the others in turn in every round.

    The plain implementations take the same time for any number of tokens, so each is timed once per round. Outputs are
    compared before anything is timed.

    Args:
        model: A preset of `flextok`.
        batch: Pictures per batch.
        tokens: Numbers of tokens kept of every picture.
        steps: Sampling steps.
        rounds: Timed rounds.
        threads: CPU threads.
        packed: Time the packed layout too (its attention grows with the square of the batch).

    Raises:
        ValueError: Not a FlexTok, or a number of tokens it does not have.
        RuntimeError: Outputs differ by more than 1e-4.
    """
    torch.set_num_threads(threads)
    tok = _filled(model)
    if not tokens or min(tokens) < 1 or max(tokens) > tok.num_tokens:
        raise ValueError(f"--tokens are 1..{tok.num_tokens} for {model}, got {list(tokens)}.")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tok.quantizer.vocab_sizes[0], (batch, tok.num_tokens), generator=generator)
    codes, noise = tok.quantizer.ids_to_codes(ids), tok.initial_noise(batch, generator)
    sampler, guide = tok.sampling.build(steps), tok.sampling.guide()

    def ours(k: int) -> Callable[[], Tensor]:
        return lambda: tok.decode_latents(codes[:, :k], noise=noise, steps=steps)

    def other(decode: Callable[..., Tensor], k: int) -> Callable[[], Tensor]:
        return lambda: decode(tok, codes, torch.full((batch,), k), noise, sampler, guide)

    with torch.inference_mode():
        rows = [{"tokens": k, "difference": _difference(ours(k), other(decode_batched, k))} for k in tokens]
        calls: dict[Any, Callable[[], Tensor]] = {k: ours(k) for k in tokens}
        calls["plain"] = other(decode_batched, tokens[0])
        if packed:
            _difference(ours(tokens[0]), other(decode_packed, tokens[0]))
            calls[PACKED] = other(decode_packed, tokens[0])
        seconds = in_turn(calls, rounds)
    for row in rows:
        row |= _against(seconds, row["tokens"])
    return FlowBench(
        model=model,
        batch=batch,
        steps=steps,
        guidance=tok.sampling.guidance,
        width=tok.decoder.position.shape[1],
        threads=threads,
        device=platform.processor() or platform.machine(),
        rows=rows,
    )


def in_turn(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Process CPU seconds of every call in every round; the order turns around from round to round."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            start = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def table(result: FlowBench) -> list[tuple[str, ...]]:
    """Rows for the terminal."""
    return [
        (
            str(row["tokens"]),
            f"{row['seconds']:.2f}",
            f"{row['plain_ratio']:.2f}",
            f"{row['packed_ratio']:.2f}" if "packed_ratio" in row else "-",
            f"{row['difference']:.1e}",
        )
        for row in result.rows
    ]


def _against(seconds: dict[Any, list[float]], k: int) -> dict[str, float]:
    own = seconds[k]
    found = {"seconds": statistics.median(own)}
    for name in ("plain", PACKED):
        if name in seconds:
            found[f"{name}_seconds"] = statistics.median(seconds[name])
            found[f"{name}_ratio"] = statistics.median(b / a for a, b in zip(own, seconds[name]))
    return found


def _difference(ours: Callable[[], Tensor], other: Callable[[], Tensor]) -> float:
    found = float((ours() - other()).abs().max())
    if not found <= TOLERANCE:
        raise RuntimeError(f"The two implementations differ by {found:.2e}, more than {TOLERANCE:g}.")
    return found


def _filled(model: str) -> FlexTok:
    """A FlexTok with random weights everywhere: untrained heads and modulations are zero, which would hide mistakes."""
    torch.manual_seed(0)
    tok = vistok.create("tokenizer", model).eval()
    if not isinstance(tok, FlexTok) or not tok.quantizer.vocab_sizes:
        raise ValueError(f"This benchmark takes FlexTok models with ids, and {model!r} is none. Try flextok_d8_d8.")
    with torch.no_grad():
        for weight in tok.decoder.parameters():
            if not weight.any():
                weight.normal_(std=0.02)
    return tok
