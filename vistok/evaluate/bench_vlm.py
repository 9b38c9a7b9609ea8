"""`vistok bench vlm`: what a compression method saves and costs, beside the same model without it, in one run."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

Inputs = dict[str, Any]
Now = Callable[[torch.device], float]
DEFAULT = ("random", "fastv", "pyramiddrop", "transprune")
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
        rows: One per method and budget, the plain model first: method, keep, image_left, prefill_ms (tower included),
            language_ms (language model alone), decode_ms (per token), peak_bytes (prefill, above what was allocated
            before), cache_bytes, flops (language model), speedup (language_ms of the plain model / ours, median of the
            per-round ratios), allowed (the same of the FLOPs) and efficiency (speedup / allowed).
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
) -> VlmBench:
    """Time methods against the plain model.

    Args:
        source: A model, a local directory of one, or None for a Llama-shaped LLaVA with random weights.
        methods: Names, or mappings `{name: ..., ...}`.
        keep: Budgets; each method runs with each.
        inputs: Prompt and pixels; required for a model given, made up for the random one.
        image_tokens: Image tokens of the random model's prompt, rounded to a square.
        depth: Layers of the random model.
        width: Its hidden size, a multiple of 64.
        rounds: Timed rounds after one warm-up.
        decode: Tokens decoded in every round.
        threads: CPU threads; torch's own number if None.
        clock: `process` counts the processor seconds of this process alone, which a busy machine hardly disturbs: for
            one CPU thread only.

    Raises:
        ValueError: A model without inputs, or a process clock where it tells nothing.
    """
    if threads:
        torch.set_num_threads(threads)
    if clock == "process" and (torch.get_num_threads() > 1 or torch.cuda.is_available()):
        raise ValueError("The process clock adds up threads and knows no GPU: use it with threads=1 on a CPU.")
    now = _now if clock == "wall" else _process_now
    model, name = _model(source, image_tokens, depth, width)
    if inputs is None:
        if source is not None:
            raise ValueError("Give `inputs` (ids, mask, pixels from the model's processor) together with a model.")
        inputs = random_inputs(model)
    settings = [_setting(method, budget) for method in methods for budget in keep]
    with torch.inference_mode():
        times = [_round(model, inputs, settings, decode, now) for _ in range(rounds + 1)][1:]
        facts = [_facts(model, inputs, setting) for setting in [None, *settings]]
    rows = [_row(setting, fact, times, i, facts[0]) for i, (setting, fact) in enumerate(zip([None, *settings], facts))]
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


def _model(source: str | Path | nn.Module | None, image_tokens: int, depth: int, width: int) -> tuple[Any, str]:
    if isinstance(source, nn.Module):
        return source.eval(), type(source).__name__
    if source is None:
        found = random_llava(image_tokens=image_tokens, depth=depth, width=width)
        return found, f"random LLaVA, {depth} layers x {width}"
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(source).eval(), str(source)


def _setting(method: str | Mapping[str, Any], budget: float | int) -> dict[str, Any]:
    given = {"name": method} if isinstance(method, str) else dict(method)
    return {**given, "keep": budget}


@contextlib.contextmanager
def _applied(model: Any, setting: Mapping[str, Any] | None) -> Iterator[Any]:
    from vistok.plugins.attach import attach

    if setting is None:
        yield None
    else:
        with attach(model, setting) as plugin:
            yield plugin


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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _process_now(device: torch.device) -> float:
    return time.process_time()


def _round(
    model: Any, inputs: Mapping[str, Any], settings: Sequence[Mapping[str, Any]], decode: int, now: Now
) -> list[Any]:
    """(prefill, language, decode per token) in seconds, of the plain model and of every setting."""
    found = []
    for setting in [None, *settings]:
        with _Clock(model, now) as clock, _applied(model, setting):
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


def _facts(model: Any, inputs: Mapping[str, Any], setting: Mapping[str, Any] | None) -> dict[str, Any]:
    """Tokens, FLOPs and bytes of one prefill."""
    with _applied(model, setting or {"name": "random", "keep": 1.0}) as plugin:
        peak, cache = _peak(model, lambda: model(**inputs, use_cache=True, logits_to_keep=1).past_key_values)
        report = plugin.report()
    stored = sum(layer.keys.numel() * layer.keys.element_size() * 2 for layer in cache.layers)
    return {
        "prompt": sum(report.trace.prompt),
        "image_left": sum(report.trace.image[-1]),
        "flops": sum(report.flops),
        "cache_bytes": stored,
        "peak_bytes": peak,
    }


def _peak(model: Any, call: Any) -> tuple[int, Any]:
    """Largest number of bytes allocated during a call above what was there before, and its result."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        result = call()
        return torch.cuda.max_memory_allocated(model.device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    level = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak, result


def _row(
    setting: Mapping[str, Any] | None, fact: dict[str, Any], times: Any, i: int, plain: dict[str, Any]
) -> dict[str, Any]:
    medians = [statistics.median(r[i][k] for r in times) * 1000 for k in range(3)]
    speedup = statistics.median(r[0][1] / r[i][1] for r in times)
    allowed = plain["flops"] / fact["flops"]
    return {
        "method": setting["name"] if setting else "none",
        "keep": setting["keep"] if setting else 1.0,
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
