"""A LLaVA around the bare decoder of a golden file, fed with the file's embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fill import fill

PLACEHOLDER = 120


def weights(keys: list[list[Any]]) -> dict[str, Tensor]:
    """Golden weights; queries and keys are doubled so that attention is far from uniform."""
    out = {k: torch.from_numpy(np.asarray(fill(k, tuple(shape)))) for k, shape in keys}
    return {k: 2 * w if k.endswith(("q_proj.weight", "k_proj.weight")) else w for k, w in out.items()}


def host(model: dict[str, Any], keys: list[list[Any]], *, extra_layers: int = 0) -> Any:
    """LLaVA whose language model is the golden decoder (plus `extra_layers` that the file does not know)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = {k: v for k, v in model.items() if k not in ("weights", "dtype")} | {
        "num_hidden_layers": model["num_hidden_layers"] + extra_layers
    }
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**text), image_token_index=PLACEHOLDER)
    found = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    report = found.model.language_model.load_state_dict(weights(keys), strict=False)
    assert not report.unexpected_keys
    assert all(f"layers.{model['num_hidden_layers']}." in k for k in report.missing_keys)
    return found


def prompt(seed: int, layout: list[int], width: int) -> Tensor:
    """The golden embeddings, (1, L, D)."""
    shape = (1, sum(layout), width)
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def prefill(model: Any, embeds: Tensor, layout: list[int], **kwargs: Any) -> Any:
    """Run the base model on system text, image and instruction given as embeddings."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    start, image, _ = layout
    row = model.get_input_embeddings().weight[PLACEHOLDER]
    marked = embeds.clone()
    marked[:, start : start + image] = row
    features = BaseModelOutputWithPooling(pooler_output=list(embeds[:, start : start + image]))
    return model.model(inputs_embeds=marked, mm_encoder_outputs={"image": features}, **kwargs)


def decode(model: Any, out: Any, seed: int, steps: int, prompt_length: int) -> Tensor:
    """Last hidden states of decode steps fed with golden embeddings, (steps, D)."""
    width = out.last_hidden_state.shape[-1]
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((steps, width)).astype(np.float32))
    found = []
    for t, row in enumerate(rows):
        positions = torch.tensor([[prompt_length + t]])
        step = model.model(
            inputs_embeds=row.view(1, 1, -1), past_key_values=out.past_key_values, position_ids=positions
        )
        found.append(step.last_hidden_state[0, -1])
    return torch.stack(found)


def lengths(out: Any) -> list[int]:
    """Cache length of every layer."""
    return [layer.get_seq_length() for layer in out.past_key_values.layers]


def record(plugin: Any) -> list[dict[str, Any]]:
    """Note scores and kept image tokens (original places) of every cut of a plug-in."""
    notes: list[dict[str, Any]] = []
    method = plugin.method
    scores, reduce = method.scores, method.reduce

    def noting_scores(view: Any) -> Tensor:
        found = scores(view)
        notes.append({"scores": found[view.segment >= 0]})
        return found

    def noting_reduce(view: Any, shape: Any) -> Any:
        decision = reduce(view, shape)
        index = view.place.gather(1, decision.reduction.index)
        image = view.segment.gather(1, decision.reduction.index) >= 0
        notes[-1]["kept"] = index[image & decision.reduction.valid]
        return decision

    method.scores, method.reduce = noting_scores, noting_reduce
    return notes
