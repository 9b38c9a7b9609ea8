"""vistok as a model of lmms-eval: any method on any supported host, on any of its tasks.

    lmms-eval --model vistok --model_args pretrained=DIR,method=fastv,keep=0.5 --tasks mme --batch_size 8

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models`. A task speaks to a model as a chat
(pictures where the task puts them) or, under `--force_simple`, as a text with the pictures in front; multiple choice by
likelihood exists in the second form only. Nothing here imports lmms-eval before lmms-eval asks.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.config import ConfigError, value_of

if TYPE_CHECKING:
    from vistok.plugins.attach import Plugin

Chat = list[dict[str, Any]]
LONGEST = 1024
"""Tokens of an answer where the task sets no limit."""
PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
GREEDY: Mapping[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def manifest() -> Any:
    """What lmms-eval's entry point loads: the name `vistok` and where its two classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vistok", simple_class_path=f"{__name__}.VistokSimple", chat_class_path=f"{__name__}.VistokChat"
    )


def __getattr__(name: str) -> Any:
    """`VistokSimple` and `VistokChat`: subclasses of lmms-eval's base, made when it asks for them."""
    if name not in ("VistokSimple", "VistokChat"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _bound(name)


@functools.cache
def _bound(name: str) -> type:
    from lmms_eval.api.model import lmms

    part = Simple if name == "VistokSimple" else Talking
    return type(name, (part, lmms), {"__module__": __name__, "__doc__": part.__doc__})


class Tally:
    """What a method left of the prompts with pictures, summed over a run."""

    def __init__(self) -> None:
        self.prompts = 0
        self.sums = dict.fromkeys(("tokens", "left", "flops", "flops_without", "cache", "cache_without"), 0)

    def add(self, plugin: Plugin | None) -> None:
        """Count the last call; nothing without a method or without pictures."""
        if plugin is None or plugin.runtime.last is None:
            return
        report = plugin.report()
        counts = [sum(images) for images in report.trace.images]
        self.prompts += sum(count > 0 for count in counts)
        found = {
            "tokens": counts,
            "left": report.trace.image[-1],
            "flops": report.flops,
            "flops_without": report.flops_without,
            "cache": report.cache_bytes,
            "cache_without": report.cache_bytes_without,
        }
        for name, values in found.items():
            self.sums[name] += sum(values)

    def figures(self) -> dict[str, float]:
        """Image tokens per prompt as the tower gives them and after the last cut, and what is left of the costs."""
        if not self.prompts:
            return {}
        s = self.sums
        return {
            "image_tokens": s["tokens"] / self.prompts,
            "image_tokens_left": s["left"] / self.prompts,
            "image_tokens_share": s["left"] / s["tokens"],
            "prefill_flops_share": s["flops"] / s["flops_without"],
            "cache_bytes_share": s["cache"] / s["cache_without"],
        }


class Adapter:
    """A host of transformers, with a method of vistok on it or as it is.

    Args:
        pretrained: Directory or hub id of the host.
        method: Name of a method, or a YAML file with one; none leaves the host alone.
        dtype: Of the weights; `auto` as they are stored.
        attn_implementation: Attention backend; transformers' own choice if None.
        device: Where the host runs; a GPU by default if there is one.
        device_map: Of `from_pretrained`, for hosts larger than a GPU.
        batch_size: Prompts at once, padded on the left.
        max_batch_size: Given by lmms-eval, not used.
        num_frames: Frames of a clip; the processor's own number if None.
        **settings: Of the method, checked as in a YAML file: `keep=0.5`, `layers=[2]`, `keep={mean: 192}`.

    Raises:
        ConfigError: Settings without a method, or one that the method does not take.
        ValueError: A batch size that is no number.
        TypeError: A host that no family fits.
    """

    task_dict: Mapping[str, Any]  # of lmms-eval's base: documents by task, split and number

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        num_frames: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if method is None and settings:
            raise ConfigError(f"{', '.join(settings)}: settings of a method, but no method is given. Add method=NAME.")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size: expected a number of prompts, got {batch_size!r}.")
        from accelerate import Accelerator
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        given: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        model = AutoModelForImageTextToText.from_pretrained(pretrained, **given).eval().requires_grad_(False)
        if not device_map:
            model.to(device if device and self._world_size == 1 else self.accelerator.device)
        self.model, self.device = model, model.device
        self.processor: Any = AutoProcessor.from_pretrained(pretrained)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.batch_size, self.num_frames = int(batch_size), num_frames
        self.plugin: Plugin | None = None
        if method is not None:
            from vistok.plugins.attach import attach

            checked = {key: value_of(value) if isinstance(value, str) else value for key, value in settings.items()}
            self.plugin = attach(model, method, **checked)

    def chat(self, request: Any) -> Chat:
        """The conversation of a request."""
        raise NotImplementedError

    def options(self, request: Any) -> Mapping[str, Any]:
        """A request's options of generation."""
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers, in the order of the requests; what the method left of the pictures goes into the log.

        Raises:
            ValueError: A task that brings sound.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        found: dict[int, Any] = {}
        tally, tokens, start = Tally(), 0, time.perf_counter()
        for numbers in _batches([repr(sorted(self.options(r).items())) for r in requests], self.batch_size):
            answers = self._answers([self.chat(requests[i]) for i in numbers], self.options(requests[numbers[0]]))
            tally.add(self.plugin)
            for number, (text, count) in zip(numbers, answers):
                found[number] = GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count))
                tokens += count
        spent = time.perf_counter() - start
        log_metrics(spent, tokens, tokens / spent, tally.figures())
        return [found[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("vistok answers questions of one round; this task asks in several. Choose another.")

    def clean(self) -> None:
        """Let go of the host."""
        if self.plugin is not None:
            self.plugin.detach()
            self.plugin = None
        super().clean()  # type: ignore[misc]  # of lmms-eval's base

    def _encode(self, chats: Sequence[Chat]) -> tuple[list[str], Any]:
        """Prompts as text, and what the host takes for them, padded on the left."""
        texts = [self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        given: dict[str, Any] = {}
        for kind in ("image", "video"):
            found = [[p[kind] for turn in chat for p in turn["content"] if p["type"] == kind] for chat in chats]
            if any(found):
                given[f"{kind}s"] = found
        if "videos" in given and self.num_frames is not None:
            given |= {"num_frames": self.num_frames, "do_sample_frames": True}
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            given["add_special_tokens"] = False
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **given)
        return texts, inputs.to(self.device, self.model.dtype)

    @torch.inference_mode()
    def _answers(self, chats: Sequence[Chat], options: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Text and number of tokens of every answer."""
        _, inputs = self._encode(chats)
        (settings, until), pad = generation(options), self.tokenizer.pad_token_id
        out = self.model.generate(**inputs, pad_token_id=pad, **settings)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(before(text, until), int((row != pad).sum())) for text, row in zip(texts, new)]


class Simple(Adapter):
    """The host asked with a text and the pictures in front of it; also scores given answers."""

    is_simple = True

    def options(self, request: Any) -> Mapping[str, Any]:
        """A request's options of generation."""
        return request.args[1] or {}

    def chat(self, request: Any) -> Chat:
        """One turn: the pictures, then the text."""
        context, _, to_visual, *where = request.args
        return self._turn(context, to_visual, where)

    def _turn(self, context: str, to_visual: Any, where: Sequence[Any]) -> Chat:
        visuals = [] if to_visual is None else to_visual(self._document(where)) or []
        return [{"role": "user", "content": [*map(shown, visuals), {"type": "text", "text": context}]}]

    def _document(self, where: Sequence[Any]) -> Any:
        number, task, split = where
        return self.task_dict[task][split][number]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Mean negative log-likelihood per token of the given answers, and whether each is the greedy one.

        A loss and not a likelihood: all models of lmms-eval return it and its tasks choose the smallest. The method
        sees the prompt alone, as in generation; the answer is then read on the shortened cache.

        Raises:
            ValueError: An answer without tokens.
        """
        from lmms_eval.api.instance import GenerationResult
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        pairs: list[tuple[float, bool]] = []
        tally, start = Tally(), time.perf_counter()
        for first in range(0, len(requests), self.batch_size):
            chats, answers = [], []
            for request in requests[first : first + self.batch_size]:
                context, target, *rest = request.args  # two alone: an answer without its question
                chats.append(self._turn(context, rest[0] if rest else None, rest[1:]))
                answers.append(target(self._document(rest[1:])) if callable(target) else target)
            pairs += self._losses(chats, answers)
            tally.add(self.plugin)
        log_metrics(time.perf_counter() - start, 0, 0.0, tally.figures())
        return [GenerationResult(text=pair) for pair in pairs]  # lmms-eval 0.7 makes a string of a bare pair

    @torch.inference_mode()
    def _losses(self, chats: Sequence[Chat], answers: Sequence[str]) -> list[tuple[float, bool]]:
        texts, inputs = self._encode(chats)
        tails = [self._tail(text, str(answer)) for text, answer in zip(texts, answers)]
        longest = max(map(len, tails))
        ids = torch.tensor([tail + tail[-1:] * (longest - len(tail)) for tail in tails], device=self.device)
        lengths = torch.tensor([[len(tail)] for tail in tails], device=self.device)
        real = torch.arange(longest, device=self.device) < lengths  # (B, T)
        place, later = self._positions(inputs, longest - 1)
        out = self.model(**inputs, **place, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1:]
        if longest > 1:
            mask = torch.cat([inputs["attention_mask"], real[:, :-1].to(inputs["attention_mask"].dtype)], dim=1)
            fed = {"input_ids": ids[:, :-1], "attention_mask": mask, "past_key_values": out.past_key_values}
            logits = torch.cat([logits, self.model(**fed, **later, use_cache=True).logits], dim=1)
        scores = logits.float().log_softmax(-1)  # (B, T, V)
        losses = -(scores.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * real).sum(1) / real.sum(1)
        greedy = ((scores.argmax(-1) == ids) | ~real).all(1)
        return list(zip(losses.tolist(), greedy.tolist()))

    def _positions(self, inputs: Mapping[str, Any], new: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Positions of a prompt and of tokens after it as `generate` counts them; none where the method counts anew."""
        from vistok.plugins.families.base import family_of
        from vistok.plugins.packer import following

        if self.plugin is not None and self.plugin.method.renumber:
            return {}, {}
        places = family_of(self.model).positions(self.model, dict(inputs), generating=True)
        later = following(places) + torch.arange(new, device=places.device)
        return {"position_ids": places}, {"position_ids": later}

    def _tail(self, prompt: str, answer: str) -> list[int]:
        """Tokens of an answer behind its prompt; a blank in front counts only where the prompt does not end in one."""
        answer = answer.lstrip() if prompt[-1:].isspace() else answer
        head, whole = (self.tokenizer.encode(text, add_special_tokens=False) for text in (prompt, prompt + answer))
        tail: list[int] = whole[len(head) :]
        if whole[: len(head)] != head:  # prompt and answer share a token
            tail = self.tokenizer.encode(answer, add_special_tokens=False)
        if not tail:
            raise ValueError(f"An answer to score has no tokens: {answer!r}.")
        return tail


class Talking(Adapter):
    """The host asked in a conversation, with pictures where the task puts them."""

    is_simple = False

    def options(self, request: Any) -> Mapping[str, Any]:
        """A request's options of generation."""
        return request.args[2] or {}

    def chat(self, request: Any) -> Chat:
        """The task's messages in the words of transformers."""
        _, to_messages, _, number, task, split = request.args
        chat = []
        for message in to_messages(self.task_dict[task][split][number]):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            chat.append({"role": message["role"], "content": [shown(part) for part in parts]})
        return chat

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("Tasks that score given answers need lmms-eval's other form: add --force_simple.")


def shown(visual: Any) -> dict[str, Any]:
    """A part of a message as transformers takes it.

    Args:
        visual: A picture; a path (a clip, unless it ends like a picture); or lmms-eval's own part of a message.

    Raises:
        ValueError: Sound.
    """
    kind, source = "image", visual
    if isinstance(visual, Mapping):
        if (kind := visual.get("type", "video")) == "text":
            return dict(visual)
        source = next((visual[key] for key in ("url", "path", kind) if key in visual), None)
    elif isinstance(visual, (str, Path)):
        kind = "image" if Path(visual).suffix.lower() in PICTURES else "video"
    if kind not in ("image", "video") or source is None:
        raise ValueError(f"Pictures and clips can be shown to a host; this task brings {kind}.")
    return {"type": kind, kind: source.convert("RGB") if hasattr(source, "convert") else source}


def generation(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `generate`, and the texts an answer ends before.

    Args:
        options: A task's `generation_kwargs`; what `generate` does not know is named in a warning.
    """
    from transformers import GenerationConfig

    options = {key: value for key, value in options.items() if value is not None}
    until = options.pop("until", [])
    limit = options.pop("max_gen_toks", LONGEST)
    known = vars(GenerationConfig())
    if other := sorted(set(options) - set(known)):
        warnings.warn(f"Options that generate() does not have are left out: {', '.join(other)}.", stacklevel=2)
    settings = {"max_new_tokens": limit} | {key: value for key, value in options.items() if key in known}
    warm = settings.get("temperature", 0) > 0
    if not settings.setdefault("do_sample", warm) or settings.get("temperature") == 0:
        settings |= GREEDY
    return settings, [text for text in ([until] if isinstance(until, str) else until) if text]


def before(text: str, until: Sequence[str]) -> str:
    """A text up to the first of some endings."""
    return text[: min([len(text), *(text.find(end) for end in until if end in text)])]


def _batches(keys: Sequence[str], size: int) -> Iterator[list[int]]:
    """Numbers of requests with equal options, so many at once."""
    for key in dict.fromkeys(keys):
        equal = [i for i, other in enumerate(keys) if other == key]
        yield from (equal[i : i + size] for i in range(0, len(equal), size))
