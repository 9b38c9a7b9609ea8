"""`vistok bench vlm --task scenes`: what a compression method costs in answers, on scenes whose evidence is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vistok.data.scenes import Question, Scenes, patches_inside
from vistok.evaluate.token_density import tokdense
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

if TYPE_CHECKING:
    from PIL.Image import Image

BASELINES = ("random", "pool", "downsample")
IN_MODEL = ("fastv", "pyramiddrop", "sparsevlm", "sparsevlm_plus", "transprune", "mustdrop", "snapkv", "h2o")
DEFAULT = (*BASELINES, *IN_MODEL)
BUDGETS = (0.5, 0.25, 0.11)
LONGEST = 5
"""Tokens of the longest answer, its end included."""


@dataclass(frozen=True)
class Item:
    """One question about one picture."""

    picture: Image
    question: Question
    choices: int


@dataclass(frozen=True, kw_only=True)
class SceneBench:
    """Result of one run.

    Attributes:
        model: Directory or class of the model.
        questions: How many were asked, at most one of each kind per scene.
        scenes: Scenes they are about.
        data: What the scenes are (split, drawings, seed, size).
        image_tokens: Tokens of a picture without compression.
        chance: Share that guessing among the possible answers of each question would get right.
        constant: Share that the most frequent answer to each kind of question gets right (`what` by category).
        rows: One per method and budget, the plain model first: method, keep, image_left, accuracy with its 95 %
            interval (low, high; Wilson), tokdense (accuracy in percent per token left), accuracy by kind of question,
            inside (share of the tokens that reach the last layer whose patch lies in the evidence boxes), prefill_ms
            (one picture, median), peak_bytes and cache_bytes of that prefill.
    """

    model: str
    questions: int
    scenes: int
    data: str
    image_tokens: int
    chance: float
    constant: float
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run(
    source: str | Path | Any,
    *,
    methods: Sequence[str | Mapping[str, Any]] = DEFAULT,
    keep: Sequence[float | int] = BUDGETS,
    scenes: Scenes | None = None,
    questions: int = 120,
    batch: int = 16,
    rounds: int = 5,
    threads: int | None = None,
    clock: Literal["wall", "process"] = "wall",
    processor: Any = None,
    dtype: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> SceneBench:
    """Ask a model about scenes without and with every method at every budget.

    Answers are generated greedily and count as right if they are the expected word, in any case, without a full stop.

    Args:
        source: A model's directory, or a model together with `processor`.
        methods: Names, mappings `{name: ..., ...}`, or YAML files with one.
        keep: Budgets; each method runs with each.
        scenes: Where the questions come from; held-out photographs by default.
        questions: How many to ask.
        batch: Questions at once.
        rounds: Timed prefills of each setting, after one to warm up.
        threads: CPU threads; torch's own number if None.
        clock: `wall` or `process`; see `vistok.evaluate.bench_vlm.run`.
        processor: Of a model that is given.
        dtype: Of the weights read from a directory; `auto` as they are stored.
        progress: Told the number of settings done.

    Raises:
        ValueError: A model without processor, or a process clock where it tells nothing.
    """
    if threads:
        torch.set_num_threads(threads)
    now = timer(clock)
    model, processor, name = _host(source, processor, dtype)
    data = scenes or Scenes(split="heldout", count=max(questions, 1))
    items = list(ask(data, questions))
    settings = [PLAIN, *settings_of(methods, keep)]
    rows = []
    for done, setting in enumerate(settings, 1):
        rows.append(_row(model, processor, setting, items, data.size, batch, rounds, now))
        if progress is not None:
            progress(done)
    answers: dict[str, list[str]] = {}
    for q in (item.question for item in items):
        answers.setdefault(q.text if q.kind == "what" else q.kind, []).append(q.answer)
    constant = sum(max(map(said.count, said)) for said in answers.values()) / len(items)
    return SceneBench(
        model=name,
        questions=len(items),
        scenes=len({id(item.picture) for item in items}),
        data=f"scenes split={data.split} seed={data.seed} size={data.size}",
        image_tokens=rows[0]["image_left"],
        chance=sum(1 / item.choices for item in items) / len(items),
        constant=constant,
        rows=rows,
    )


def ask(scenes: Scenes, count: int) -> Iterator[Item]:
    """The first questions of scene after scene, one of each kind per scene.

    Raises:
        ValueError: The scenes have fewer questions.
    """
    left = count
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        first = {q.kind: q for q in reversed(scene.questions)}
        for question in list(first.values())[:left]:
            yield Item(scene.picture, question, len(scenes.answers(question.kind, question.text)))
            left -= 1
        if not left:
            return
    raise ValueError(f"{len(scenes)} scenes have {count - left} questions, not {count}. Raise the count of scenes.")


def encode(processor: Any, items: Sequence[Item]) -> dict[str, Tensor]:
    """What the model takes, left-padded."""
    texts = []
    for item in items:
        content = [{"type": "image"}, {"type": "text", "text": item.question.text}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    processor.tokenizer.padding_side = "left"
    pictures = [item.picture for item in items]
    return dict(processor(text=texts, images=pictures, padding=True, return_tensors="pt"))


def inside_share(kept: Tensor, placeholders: Tensor, item: Item, size: int) -> float | None:
    """Share of kept image tokens whose patch lies in the evidence boxes; None where there is no evidence.

    Args:
        kept: Columns of the prompt that were kept, (K,).
        placeholders: Columns of the prompt that are image tokens, bool (L,).
        item: The question.
        size: Side of its picture.
    """
    if not item.question.boxes or not len(kept):
        return None
    count = int(placeholders.sum())
    side = round(count**0.5)
    if side * side != count:
        return None  # tiles and newlines: no single grid
    patch = placeholders.long().cumsum(0)[kept] - 1
    return float(patches_inside(item.question.boxes, (side, side), size)[patch.numpy()].mean())


def _host(source: Any, processor: Any, dtype: str) -> tuple[Any, Any, str]:
    if isinstance(source, torch.nn.Module):
        if processor is None:
            raise ValueError("Give the model's processor together with a model.")
        return source.eval(), processor, type(source).__name__
    from transformers import AutoProcessor

    return load_host(source, dtype), AutoProcessor.from_pretrained(source), str(source)


@torch.inference_mode()
def _row(
    model: Any,
    processor: Any,
    setting: Setting,
    items: list[Item],
    size: int,
    batch: int,
    rounds: int,
    now: Now,
) -> dict[str, Any]:
    from vistok.plugins.families.base import family_of

    right: list[bool] = []
    inside: list[float] = []
    with applied(model, setting.method or {"name": "random", "keep": 1.0}) as plugin:
        token = family_of(model).placeholders(model)["image"]
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            inputs = encode(processor, part)
            inputs = {k: v.to(model.device) for k, v in inputs.items()}
            out = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
            said = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += [_plain(text) == item.question.answer for text, item in zip(said, part)]
            masks = (inputs["input_ids"] == token).cpu()
            shares = [inside_share(k, m, item, size) for k, m, item in zip(plugin.trace.kept, masks, part)]
            inside += [share for share in shares if share is not None]
        left = plugin.trace.image[-1][0]
    by_kind = {
        kind: [ok for ok, item in zip(right, items) if item.question.kind == kind]
        for kind in sorted({item.question.kind for item in items})
    }
    low, high = wilson(sum(right), len(right))
    return {
        "method": setting.label,
        "keep": left if setting.keep is None else setting.keep,
        "image_left": left,
        "accuracy": sum(right) / len(right),
        "tokdense": tokdense(100 * sum(right) / len(right), left) if left else None,
        "low": low,
        "high": high,
        "by_kind": {kind: sum(oks) / len(oks) for kind, oks in by_kind.items()},
        "inside": sum(inside) / len(inside) if inside else None,
        **_cost(model, encode(processor, items[:1]), setting, rounds, now),
    }


def _cost(model: Any, inputs: Mapping[str, Tensor], setting: Setting, rounds: int, now: Now) -> dict[str, Any]:
    inputs = {k: v.to(model.device) for k, v in inputs.items()}
    times = []
    with applied(model, setting.method):
        for _ in range(rounds + 1):
            start = now(model.device)
            model(**inputs, use_cache=True, logits_to_keep=1)
            times.append((now(model.device) - start) * 1000)
        peak, cache = measure_peak(model, lambda: model(**inputs, use_cache=True, logits_to_keep=1).past_key_values)
    return {"prefill_ms": float(np.median(times[1:])), "peak_bytes": peak, "cache_bytes": cache_bytes(cache)}


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, p = 1.96, right / count
    middle, half = p + z * z / (2 * count), z * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale


def table(result: SceneBench) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and cells for the terminal or Markdown."""
    kinds = sorted(result.rows[0]["by_kind"])
    heads = ("method", "keep>", "tokens>", "accuracy>", "95 % interval", *(f"{kind}>" for kind in kinds))
    heads += ("inside evidence>", "prefill ms>", "peak MB>", "KV MB>")
    cells = []
    for r in result.rows:
        cells.append(
            (
                r["method"],
                f"{r['keep']:g}",
                str(r["image_left"]),
                f"{r['accuracy']:.1%}",
                f"{r['low']:.1%} to {r['high']:.1%}",
                *(f"{r['by_kind'][kind]:.0%}" for kind in kinds),
                "" if r["inside"] is None else f"{r['inside']:.1%}",
                f"{r['prefill_ms']:.0f}",
                f"{r['peak_bytes'] / 1e6:.1f}",
                f"{r['cache_bytes'] / 1e6:.2f}",
            )
        )
    return heads, cells


def caption(result: SceneBench) -> str:
    """What the table's figures stand beside."""
    asked = f"{result.questions} questions about {result.scenes} scenes ({result.data})"
    return (
        f"{asked}, {result.image_tokens} image tokens each. Guessing among the possible answers gets "
        f"{result.chance:.1%}, always the most frequent answer to a kind of question {result.constant:.1%}."
    )


def plot(result: SceneBench, path: Path) -> None:
    """Draw accuracy, evidence, latency and memory against the tokens kept, a line per method."""
    panels = (("accuracy", "accuracy, %", 100.0), ("inside", "kept tokens inside the evidence, %", 100.0))
    cost = (("prefill_ms", "prefill, ms", 1.0), ("peak_bytes", "peak of the prefill, MB", 1e-6))
    draw(result.rows, [*panels, *cost], path, f"{result.questions} questions about {result.scenes} scenes")
