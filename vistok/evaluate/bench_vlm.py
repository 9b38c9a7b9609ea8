"""`vistok bench vlm`: what a compression method saves and costs, beside the same model without it, in one run."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vistok.evaluate.vlm import (
    PLAIN,
    Now,
    Setting,
    applied,
    cache_bytes,
    draw,
    load_host,
    measure_peak,
    settings_of,
    timer,
)

Inputs = dict[str, Any]
DEFAULT = ("random", "fastv", "pyramiddrop", "transprune")
SWEEP = (0.9, 0.75, 0.5, 0.35, 0.25, 0.11)
"""Shares of `vistok bench vlm --sweep`."""
PATCH, TEXT_BEFORE, TEXT_AFTER = 14, 20, 40


@dataclass(frozen=True, kw_only=True)
class VlmBench:
    """Result of one run; times are medians over rounds in which every method and the plain model ran in turn.

    Attributes:
        model: Directory, or the sizes of the random model.
        device: What it ran on.
        threads: CPU threads.
        attention: Attention backend, the same for all rows.
        prompt: Tokens of the prompt.
        image_tokens: Image tokens among them.
        rows: One per method and budget, the plain model first: method (or the name of its file), keep, image_left,
            prefill_ms (tower included), language_ms (language model alone), decode_ms (per token), peak_bytes (prefill,
            above what was allocated before), cache_bytes, flops (language model), speedup (language_ms of the plain
            model / ours, median of the per-round ratios), allowed (the same of the FLOPs) and efficiency (speedup /
            allowed).
    """

    model: str
    device: str
    threads: int
    attention: str
    prompt: int
    image_tokens: int
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run(
    source: str | Path | nn.Module | None = None,
    *,
    methods: Sequence[str | Mapping[str, Any]] = DEFAULT,
    keep: Sequence[float | int] = (0.75, 0.5, 0.25),
    inputs: Mapping[str, Any] | None = None,
    image_tokens: int = 576,
    depth: int = 12,
    width: int = 768,
    rounds: int = 5,
    decode: int = 8,
    threads: int | None = None,
    clock: Literal["wall", "process"] = "wall",
    dtype: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> VlmBench:
    """Time methods against the plain model.

    Args:
        source: A model, a local directory of one, or None for a Llama-shaped LLaVA with random weights.
        methods: Names, mappings `{name: ..., ...}`, or YAML files with one; see `settings_of`.
        keep: Budgets; each method runs with each.
        inputs: Prompt and pixels; for a directory a question about a bundled photograph if None, for the random model
            made up, for another model required.
        image_tokens: Image tokens of the random model's prompt, rounded to a square.
        depth: Layers of the random model.
        width: Its hidden size, a multiple of 64.
        rounds: Timed rounds after one warm-up.
        decode: Tokens decoded in every round.
        threads: CPU threads; torch's own number if None.
        clock: `process` counts the processor seconds of this process alone, which a busy machine hardly disturbs: for
            one CPU thread only.
        dtype: Of the weights read from a directory; `auto` as they are stored.
        progress: Told the number of rounds done.

    Raises:
        ValueError: A model without inputs, or a process clock where it tells nothing.
    """
    if threads:
        torch.set_num_threads(threads)
    now = timer(clock)
    settings = [PLAIN, *settings_of(methods, keep)]
    model, name = _model(source, image_tokens, depth, width, dtype)
    if inputs is None:
        inputs = _question(source, model)
    times = []
    with torch.inference_mode():
        for done in range(rounds + 1):
            times.append(_round(model, inputs, settings, decode, now))
            if progress is not None:
                progress(done + 1)
        facts = [_facts(model, inputs, setting) for setting in settings]
    rows = [_row(setting, fact, times[1:], i, facts[0]) for i, (setting, fact) in enumerate(zip(settings, facts))]
    return VlmBench(
        model=name,
        device=platform.processor() or platform.machine() if model.device.type == "cpu" else str(model.device),
        threads=torch.get_num_threads(),
        attention=str(model.config._attn_implementation),
        prompt=facts[0]["prompt"],
        image_tokens=facts[0]["image_left"],
        rows=rows,
    )


def random_llava(*, image_tokens: int = 576, depth: int = 12, width: int = 768) -> Any:
    """A Llama-shaped LLaVA with random weights and a token-sized tower, so that the language model is what is timed."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PATCH * max(1, round(math.sqrt(image_tokens))),
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3 // 64 * 64,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        vocab_size=1000,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=999, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def random_inputs(model: Any) -> Inputs:
    """A prompt with one picture for `random_llava`."""
    size = model.config.vision_config.image_size
    words = torch.randint(1, 900, (1, TEXT_BEFORE + TEXT_AFTER))
    image = torch.full((1, (size // PATCH) ** 2), model.config.image_token_id)
    ids = torch.cat([words[:, :TEXT_BEFORE], image, words[:, TEXT_BEFORE:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(1, 3, size, size)}


def _model(
    source: str | Path | nn.Module | None, image_tokens: int, depth: int, width: int, dtype: str
) -> tuple[Any, str]:
    if isinstance(source, nn.Module):
        return source.eval(), type(source).__name__
    if source is None:
        found = random_llava(image_tokens=image_tokens, depth=depth, width=width)
        return found, f"random LLaVA, {depth} layers x {width}"
    return load_host(source, dtype), str(source)


def _question(source: str | Path | nn.Module | None, model: Any) -> Inputs:
    """Inputs where none were given."""
    if source is None:
        return random_inputs(model)
    if isinstance(source, nn.Module):
        raise ValueError("Give `inputs` (ids, mask, pixels from the model's processor) together with a model.")
    from transformers import AutoProcessor

    from vistok.data.bundled import Photos

    processor: Any = AutoProcessor.from_pretrained(source)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=Photos(split="heldout").read(0).picture, return_tensors="pt")
    return {k: v.to(model.device) for k, v in inputs.items()}


class _Clock:
    """Times the language model: from its first layer's input to the head's."""

    def __init__(self, model: Any, now: Now) -> None:
        from vistok.plugins.families.base import family_of

        self.start = self.seconds = 0.0
        text = family_of(model).text_model(model)
        self.hooks = [
            text.register_forward_pre_hook(self._begin),
            model.get_output_embeddings().register_forward_pre_hook(self._end),
        ]
        self.now, self.device = now, model.device

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.start = self.now(self.device)

    def _end(self, module: nn.Module, args: Any) -> None:
        self.seconds = self.now(self.device) - self.start

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _round(model: Any, inputs: Mapping[str, Any], settings: Sequence[Setting], decode: int, now: Now) -> list[Any]:
    """(prefill, language, decode per token) in seconds, of every setting."""
    found = []
    for setting in settings:
        with _Clock(model, now) as clock, applied(model, setting.method):
            start = now(model.device)
            out = model(**inputs, use_cache=True, logits_to_keep=1)
            prefill, language = now(model.device) - start, clock.seconds
            token = out.logits[:, -1:].argmax(-1)
            start = now(model.device)
            for _ in range(decode):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            found.append((prefill, language, (now(model.device) - start) / max(decode, 1)))
    return found


def _facts(model: Any, inputs: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Tokens, FLOPs and bytes of one prefill."""
    with applied(model, setting.method or {"name": "random", "keep": 1.0}) as plugin:
        peak, cache = measure_peak(model, lambda: model(**inputs, use_cache=True, logits_to_keep=1).past_key_values)
        report = plugin.report()
    return {
        "prompt": sum(report.trace.prompt),
        "image_left": sum(report.trace.image[-1]),
        "flops": sum(report.flops),
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": peak,
    }


def _row(setting: Setting, fact: dict[str, Any], times: Any, i: int, plain: dict[str, Any]) -> dict[str, Any]:
    medians = [statistics.median(r[i][k] for r in times) * 1000 for k in range(3)]
    speedup = statistics.median(r[0][1] / r[i][1] for r in times)
    allowed = plain["flops"] / fact["flops"]
    return {
        "method": setting.label,
        "keep": fact["image_left"] if setting.keep is None else setting.keep,
        "image_left": fact["image_left"],
        "prefill_ms": medians[0],
        "language_ms": medians[1],
        "decode_ms": medians[2],
        "peak_bytes": fact["peak_bytes"],
        "cache_bytes": fact["cache_bytes"],
        "flops": fact["flops"],
        "speedup": speedup,
        "allowed": allowed,
        "efficiency": speedup / allowed,
    }


def table(result: VlmBench) -> str:
    """The rows as text."""
    head = (
        f"{'method':16}{'keep':>6}{'left':>6}{'prefill':>9}{'LM':>8}{'decode':>8}{'peak MB':>9}{'KV MB':>7}{'GFLOP':>8}"
    )
    lines = [head + f"{'speed-up':>10}{'allowed':>9}{'eff.':>6}"]
    for r in result.rows:
        lines.append(
            f"{r['method']:16}{r['keep']:>6}{r['image_left']:>6}{r['prefill_ms']:>9.1f}{r['language_ms']:>8.1f}"
            f"{r['decode_ms']:>8.2f}{r['peak_bytes'] / 1e6:>9.1f}{r['cache_bytes'] / 1e6:>7.1f}{r['flops'] / 1e9:>8.1f}"
            f"{r['speedup']:>10.2f}{r['allowed']:>9.2f}{r['efficiency']:>6.2f}"
        )
    return "\n".join(lines)


def plot(result: VlmBench, path: Path) -> None:
    """Draw latency and peak memory against the tokens kept, a line per method (PNG, SVG or PDF by the ending)."""
    panels = (("prefill_ms", "prefill, ms", 1.0), ("decode_ms", "decoding, ms per token", 1.0))
    draw(result.rows, [*panels, ("peak_bytes", "peak of the prefill, MB", 1e-6)], path, result.model)
