"""What selections between tower and language model cost beside the tower: five CLIP-L/336 tiles, 2,880 tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vistok.compress.method import FeatureMethod
from vistok.config import create
from vistok.registry import list_names, registry

BLOCKS, TILES, SIDE, PATCH = 24, 5, 336, 14
SHALLOW = 1
"""Blocks that really run: a tower's blocks cost the same, so the time of all 24 follows from theirs."""


def selections() -> list[str]:
    """Methods between tower and language model that work on pictures, read no pixels anew and need no training."""
    found = []
    for name in list_names("method"):
        _, builder, preset = registry("method").resolve(name)
        if preset is not None or not (isinstance(builder, type) and issubclass(builder, FeatureMethod)):
            continue
        method = create("method", name)
        if (
            method.stages == {"features"}
            and "image" in method.modalities
            and not (method.trained or method.needs & {"pixels"})
        ):
            found.append(name)
    return found


def run(
    methods: Sequence[str | Mapping[str, Any]] | None = None,
    *,
    keep: float = 640 / 2880,
    rounds: int = 3,
    width: int = 4096,
    blocks: int = SHALLOW,
    tower: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Processor time of every selection as a share of the tower's, on LLaVA-NeXT with random weights.

    The selection's time is that of reading the tower's signals and of choosing tokens, as they run inside
    `plugin.prepare`; the tower's is that of its blocks, embedding and projector left out. Minima over the rounds.

    Args:
        methods: Names or mappings; all that fit by default.
        keep: Share of tokens that stay, for methods that take one.
        rounds: Timed rounds after one warm-up.
        width: Of the language model, which is what projected features are compared in.
        blocks: Blocks that really run.
        tower: Other sizes of the tower: hidden_size, intermediate_size, num_attention_heads, image_size, patch_size.

    Returns:
        One row per method: method, needs, left, process_ms, tower_ms, share.
    """
    model = random_host(width, blocks, dict(tower or {}))
    inputs = random_inputs(model)
    rows = []
    for given in selections() if methods is None else methods:
        setting = {"name": given} if isinstance(given, str) else dict(given)
        _, builder, _ = registry("method").resolve(setting["name"])
        takes = "keep" in builder.__init__.__annotations__  # type: ignore[misc]
        rows.append(_row(model, inputs, {"keep": keep, **setting} if takes else setting, rounds))
    best = min(row["tower_ms"] for row in rows)
    return [{**row, "tower_ms": best, "share": row["process_ms"] / best} for row in rows]


def random_host(width: int, blocks: int, sizes: dict[str, int]) -> Any:
    """LLaVA-NeXT with a CLIP-L tower of a few blocks and a language model that is not run."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    size = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "image_size": SIDE,
        "patch_size": PATCH,
        **sizes,
    }
    vision = CLIPVisionConfig(**size, num_hidden_layers=blocks)
    text = LlamaConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, vocab_size=100
    )
    side = size["image_size"]
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=99,
        image_grid_pinpoints=[[2 * side, 2 * side]],
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(config).eval().requires_grad_(False)


def random_inputs(model: Any) -> dict[str, Any]:
    """A square picture in five tiles, and a prompt for it."""
    side = model.config.vision_config.image_size
    pixels = torch.rand(1, TILES, 3, side, side)
    sizes = torch.tensor([[2 * side, 2 * side]])
    features = model.base_model.get_image_features(pixels, sizes, return_dict=True).pooler_output
    image = torch.full((1, len(features[0])), 99)
    words = torch.randint(1, 90, (1, 40))
    ids = torch.cat([words[:, :10], image, words[:, 10:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}


def _row(model: Any, inputs: Mapping[str, Any], setting: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    from vistok.plugins.attach import attach

    chosen, tower = [], []
    with attach(model, setting) as plugin, torch.inference_mode():
        for _ in range(rounds + 1):
            with _watch() as spent, _blocks(model) as block:
                packed = plugin.prepare(inputs)
            chosen.append(spent[0])
            tower.append(sum(block) / len(block) * BLOCKS)
        needs = sorted(plugin.method.needs) or ["features"]
        left = int((packed["input_ids"] == 99).sum())
    return {
        "method": setting["name"],
        "needs": needs,
        "left": left,
        "process_ms": min(chosen[1:]) * 1000,
        "tower_ms": min(tower[1:]) * 1000,
    }


@contextmanager
def _watch() -> Iterator[list[float]]:
    """Adds up the processor time of the steps that make a selection, by wrapping them while it lasts."""
    from vistok.plugins import features

    spent = [0.0]
    names = ("_add_signals", "_add_text", "compress_image")
    before = {name: getattr(features, name) for name in names}

    def timed(step: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            found = step(*args, **kwargs)
            spent[0] += time.process_time() - start
            return found

        return wrapper

    for name, step in before.items():
        setattr(features, name, timed(step))
    try:
        yield spent
    finally:
        for name, step in before.items():
            setattr(features, name, step)


@contextmanager
def _blocks(model: Any) -> Iterator[list[float]]:
    """Processor time of every block of the tower."""
    times: list[float] = []
    starts: list[float] = []

    def begin(module: nn.Module, args: Any) -> None:
        starts.append(time.process_time())

    def end(module: nn.Module, args: Any, output: Any) -> None:
        times.append(time.process_time() - starts.pop())

    layers = model.base_model.vision_tower.encoder.layers
    hooks = [hook for x in layers for hook in (x.register_forward_pre_hook(begin), x.register_forward_hook(end))]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()
