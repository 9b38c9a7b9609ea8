"""Tiny random host models, prompts for them, and an emulation of removal by masking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE, VOCAB, PAD = 60, 64, 0
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
PATCHES = 16  # of a 56-pixel picture


def sharpen(model: torch.nn.Module) -> Any:
    """Random weights with attention that is far from uniform, so that decisions have margins."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        scale = 1 / max(parameter[0].numel(), 1) ** 0.5 if parameter.ndim > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * scale
        gain = 2.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 0.25 if "lm_head" in name else 1.0
        parameter.data = noise * gain if parameter.ndim > 1 else noise + ("norm" in name and "bias" not in name)
    return model.eval().requires_grad_(False)


def llava(attn: str = "sdpa", **text: Any) -> Any:
    """LLaVA: CLIP tower on 56-pixel pictures (16 tokens), Llama of 6 layers with grouped heads."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**TEXT, **text}),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
    )
    config._attn_implementation = attn
    return sharpen(LlavaForConditionalGeneration(config))


def words(count: int, seed: int) -> list[int]:
    """Text tokens."""
    return torch.randint(1, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def picture(*shape: int, seed: int = 0) -> Tensor:
    """Random pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pad_left(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows of ids as one left-padded batch."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def llava_inputs(images_per_row: tuple[int, ...] = (1,), seed: int = 0) -> dict[str, Any]:
    """A left-padded batch; images stand at different places, text between them differs in length."""
    rows = []
    for r, images in enumerate(images_per_row):
        row = words(3 + 2 * r + seed % 3, seed + 10 * r)
        for i in range(images):
            row += [IMAGE] * PATCHES + words(2 + (i + r) % 3, seed + 10 * r + i + 1)
        rows.append(row + words(3 + (r * 2) % 5, seed + 100 + r))
    inputs = pad_left(rows)
    total = sum(images_per_row)
    if total:
        inputs["pixel_values"] = picture(total, 3, 56, 56, seed=seed)
    return inputs


def split_rows(inputs: dict[str, Any], images_per_row: tuple[int, ...]) -> list[dict[str, Any]]:
    """The same samples one by one, without padding."""
    singles, start = [], 0
    for r, images in enumerate(images_per_row):
        ids = inputs["input_ids"][r : r + 1, inputs["attention_mask"][r].bool()]
        single = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            single["pixel_values"] = inputs["pixel_values"][start : start + images]
        start += images
        singles.append(single)
    return singles


def generate(model: Any, inputs: dict[str, Any], steps: int = 4, **kwargs: Any) -> Any:
    """Greedy tokens and logits."""
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=kwargs.pop("do_sample", False),
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=PAD,
        suppress_tokens=[60, 61, 62, 63],  # a random model may say it, and the emulation would take it for a picture
        **kwargs,
    )


def logits(output: Any) -> Tensor:
    """Logits of every step, (B, steps, V)."""
    return torch.stack(output.logits, dim=1)


def emulate(model: Any, inputs: dict[str, Any], plugin_call: Any, tokens: Tensor, family: Any = None) -> Tensor:
    """Logits of the same steps with nothing removed: from each cut on, dropped tokens are only hidden as keys.

    One uncached pass over prompt and generated tokens, original positions, per-layer 4-D masks.
    """
    new = tokens.shape[1]
    ids = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[:, :-1])], dim=1)
    length, prompt = ids.shape[1], inputs["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    handles = []
    text = model.base_model.language_model if family is None else family.text_model(model)
    for i, layer in enumerate(text.layers):
        by_prompt, by_new = (
            torch.zeros(ids.shape[0], length, dtype=torch.bool).scatter(1, columns.index, columns.valid)
            for columns in (plugin_call.columns_at(i), plugin_call.cached_at(i))
        )
        by_new[:, prompt:] = True
        seen = torch.cat(
            [by_prompt[:, None].expand(-1, prompt, -1), by_new[:, None].expand(-1, length - prompt, -1)], 1
        )
        allowed = causal & seen[:, None]
        allowed = allowed | torch.eye(length, dtype=torch.bool)  # a row that sees nothing looks at itself: unused

        def hide(module: Any, args: Any, kwargs: Any, allowed: Tensor = allowed) -> Any:
            full = allowed
            if model.config._attn_implementation == "eager":
                full = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(
                    ~allowed, torch.finfo(torch.float32).min
                )
            return args, {**kwargs, "attention_mask": full}

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if family is not None and family.mrope:
        given = family.positions(model, inputs, generating=True)  # (4, B, L)
        steps = given.amax(2, keepdim=True) + 1 + torch.arange(new - 1)
        positions = torch.cat([given, steps], dim=2)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    try:
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **rest)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[:, -new:]
