"""Trained compressors at work: the tower's hidden states and the question in, a few tokens per picture out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.compress.compressors.base import TrainedCompressor
from vistok.compress.reduction import Reduction
from vistok.compress.resample import LEVELS, out_grid
from vistok.compress.trained import TrainedMethod
from vistok.config import create, schema
from vistok.plugins.families.base import Block, Family, Patches, entry
from vistok.plugins.features import Encoded
from vistok.plugins.layout import split_sizes
from vistok.plugins.smaller import place
from vistok.registry import registry

if TYPE_CHECKING:
    from vistok.plugins.runtime import Runtime

PUBLISHED_DEPTH = 24
"""Blocks of the tower that `LEVELS` are hidden states of."""


def build_for(model: Any, family: Family, name: str, **config: Any) -> TrainedCompressor:
    """An untrained compressor of the sizes of a host.

    Args:
        model: The host.
        family: What is where in it.
        name: Registered compressor.
        **config: What differs: `window`, other `levels`, ...; by default the published levels, scaled to the tower.
    """
    family.refuse(model, name, TrainedMethod.needs)
    tower = family.tower(model).config
    width, language = int(tower.hidden_size), family.host_shape(model).width
    side = int(tower.image_size // tower.patch_size)
    layers = model.config.vision_feature_layer
    levels = scaled_levels(int(tower.num_hidden_layers))
    sizes: dict[str, Any] = {
        "dim": width * (1 if isinstance(layers, int) else len(layers)),
        "out_dim": language,
        "levels": levels,
        "levels_dim": len(config.get("levels", levels)) * width,
        "grid": (side, side),
    }
    if "text_dim" in schema(registry("compressor").resolve(name)[1]):
        sizes["text_dim"] = language
    built: TrainedCompressor = create("compressor", name, **{**sizes, **config})
    return built


def scaled_levels(depth: int) -> tuple[int, ...]:
    """The published levels of a tower of `depth` blocks: of 12 blocks 6, 8, 11, 11."""
    return tuple(max(1, min(depth, round(level * depth / PUBLISHED_DEPTH))) for level in LEVELS)


def refuse_misfit(runtime: Runtime, name: str) -> None:
    """Refuse a compressor that was made for another host, before anything is changed.

    Raises:
        ValueError: No compressor, or one of other widths or levels; the message names both.
    """
    method, model, family = runtime.method, runtime.model, runtime.family
    assert isinstance(method, TrainedMethod)
    module, tower = method.module, family.tower(model).config
    layers = model.config.vision_feature_layer
    width, language = int(tower.hidden_size), runtime.host.width
    found = {
        "tower width": (module.dim, width * (1 if isinstance(layers, int) else len(layers))),
        "width of the levels": (module.levels_dim, width * len(module.levels)),
        "language model width": (module.out_dim, language),
        "question width": (module.text_dim or language, language),
    }
    wrong = [f"{what} {ours}, the host's is {theirs}" for what, (ours, theirs) in found.items() if ours != theirs]
    if max(module.levels) > tower.num_hidden_layers:
        wrong.append(f"hidden states {list(module.levels)}, the host's tower has {tower.num_hidden_layers} blocks")
    if wrong:
        raise ValueError(f"This {name} compressor was made for another host: {'; '.join(wrong)}.")


def compressed(runtime: Runtime, kwargs: dict[str, Any], masks: dict[str, Tensor]) -> Encoded:
    """Run the tower and let a compressor take the projector's place; arguments and result as `features.compress`.

    Clips go to the language model as they are.

    Raises:
        ValueError: Pictures that are encoded already, or that windows do not cover.
        TypeError: The tower's tokens are more than patches.
    """
    model, family, method = runtime.model, runtime.family, runtime.method
    assert isinstance(method, TrainedMethod)
    given = {k: v for k, v in (kwargs.get("mm_encoder_outputs") or {}).items() if v is not None}
    if "image" in given:
        raise ValueError(
            f"{method.builder} reads the vision tower while it runs, and this prompt comes with encoded pictures. "
            "Give pixels."
        )
    new, entries, sizes = {}, {}, {}
    blocks: list[list[Block]] = []
    if kwargs.get("pixel_values") is not None:
        with torch.no_grad():
            patches = family.patches(model, kwargs)
        blocks = patches.blocks
        sizes["image"] = [sum(block.length + len(block.newlines) for block in image) for image in blocks]
        text = _text(runtime, kwargs, masks, sizes["image"])
        small = family.placed(model, kwargs, patches, _tokens(runtime, patches, text), method.module.window)
        entries["image"] = [place(f, full, grids) for f, full, grids in zip(small.features, blocks, small.grids)]
        new["image"] = family.rebuilt(copy.copy(small.output), small.features)
    video = given.get("video")
    if kwargs.get("pixel_values_videos") is not None:
        video = family.encode(model, {k: v for k, v in kwargs.items() if k != "pixel_values"})["video"]
    if video is not None:
        clips = family.features(model, video)
        everything = [torch.arange(len(clip), device=clip.device)[None] for clip in clips]
        entries["video"] = [entry(c, Reduction(i, torch.ones_like(i), len(c))) for c, i in zip(clips, everything)]
        sizes["video"], new["video"] = [len(clip) for clip in clips], video
    return new, entries, sizes, blocks


def _tokens(runtime: Runtime, patches: Patches, text: Tensor | None) -> Tensor:
    """Tokens of every tile, (T, M, D)."""
    method = runtime.method
    assert isinstance(method, TrainedMethod)
    h, w = patches.grid
    out_grid(patches.grid, method.module.window)
    if patches.features.shape[1] != h * w:
        raise TypeError(
            f"A picture of {h} x {w} patches gives {patches.features.shape[1]} tokens: {method.builder} needs patches "
            'alone to go to the projector. Set vision_feature_select_strategy to "default".'
        )
    levels = torch.cat([patches.states[i][:, -h * w :] for i in method.module.levels], dim=-1)
    if text is not None:
        text = text.repeat_interleave(torch.tensor(patches.tiles, device=text.device), dim=0)
    return method.tokens(patches.features, levels, patches.grid, text)


def _text(runtime: Runtime, kwargs: dict[str, Any], masks: dict[str, Tensor], sizes: list[int]) -> Tensor | None:
    """Vector of every image's question, (images, t); None if the compressor reads none."""
    method = runtime.method
    assert isinstance(method, TrainedMethod)
    module = method.module
    if module.text_dim is None:
        return None
    with torch.no_grad():
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = runtime.model.get_input_embeddings()(ids)
        columns = question_columns(kwargs, masks, sizes, module.skip)
        questions = [embeds[row, where] for row, where in columns]
        if module.question == "embeddings":
            return torch.stack([q.float().mean(0) if len(q) else q.new_zeros(q.shape[1]).float() for q in questions])
        return _last_hidden(runtime, columns, questions)


def question_columns(
    kwargs: dict[str, Any], masks: dict[str, Tensor], sizes: list[int], skip: tuple[int, int]
) -> list[tuple[int, Tensor]]:
    """Sample and columns of every image's question: the text behind it, up to the first answer if labels are given.

    An image that nothing follows is asked about in front of it.

    Args:
        kwargs: Arguments of the host.
        masks: Placeholders of every modality, (B, L).
        sizes: Placeholders of every image.
        skip: Tokens to leave out at either end, as long as one is left.
    """
    real, labels, mask = kwargs.get("attention_mask"), kwargs.get("labels"), masks["image"]
    placeholders = torch.stack(list(masks.values())).any(0)
    text = ~placeholders if real is None else real.bool() & ~placeholders
    answers = torch.zeros_like(text) if labels is None else (labels != -100) & text
    found = []
    for row, images in enumerate(split_sizes("image", sizes, mask.sum(1).tolist())):
        columns = torch.where(mask[row])[0]
        said, answered = torch.where(text[row])[0], torch.where(answers[row])[0]
        for size in images:
            last, columns = columns[size - 1], columns[size:]
            stop = next(iter(answered[answered > last].tolist()), text.shape[1])
            behind = said[(said > last) & (said < stop)]
            behind = behind if len(behind) else said[said < last]
            inner = behind[skip[0] : len(behind) - skip[1]]
            found.append((row, inner if len(inner) else behind))
    return found


def _last_hidden(runtime: Runtime, columns: list[tuple[int, Tensor]], questions: list[Tensor]) -> Tensor:
    """The language model's last hidden state at the end of each question, which it reads alone, (images, D).

    Questions of the same columns are read once. Padding stands on the right, where causal attention does not see it.
    """
    first = getattr(runtime.text.config, "bos_token_id", None)
    keys = [(row, *where.tolist()) for row, where in columns]
    apart = list(dict.fromkeys(keys))
    once = [questions[keys.index(key)] for key in apart]
    if isinstance(first, int):
        begin = runtime.model.get_input_embeddings()(torch.tensor([first], device=questions[0].device))
        once = [torch.cat([begin.to(q), q]) for q in once]
    lengths = [max(len(q), 1) for q in once]
    padded = questions[0].new_zeros(len(once), max(lengths), questions[0].shape[1])
    for place_, q in zip(padded, once):
        place_[: len(q)] = q
    hidden = runtime.text(inputs_embeds=padded, use_cache=False).last_hidden_state
    last: Tensor = hidden[torch.arange(len(once)), torch.tensor(lengths) - 1]
    return last[torch.tensor([apart.index(key) for key in keys], device=last.device)]
