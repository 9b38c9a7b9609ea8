"""Official Instella-T2I checkpoints (AMD-AIG-AIMA/Instella-T2I): the binary auto-encoder's keys and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.registry import Weights, preset
from vistok.tokenizers.official import FORMATS, Converted, Format, Rules, rename

RULES: Rules = (
    (r"^encoder\.latent_tokens$", "encoder.latents"),
    (r"^encoder\.patch_embedder\.", "encoder.patch_embed."),
    (r"^decoder\.mask_tokens$", "decoder.mask_token"),
    (r"^decoder\.input_layer\.0\.", "decoder.norm_in."),
    (r"^decoder\.input_layer\.1\.", "decoder.embed."),
    (r"^decoder\.repa_proj\.", "decoder.repa."),
    (r"^to_pixel\.", "decoder.to_patch."),
    (r"^(encoder|decoder)\.(down|up)_layers\.0\.", r"\1.transformer.resize."),
    (r"^(encoder|decoder)\.transformer_blocks\.(\d+)\.", r"\1.transformer.blocks.\2."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.attn\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.norm."),
    (r"^encoder\.proj_out\.", "encoder.head."),
    (r"^quantizer\.proj\.0\.", "quantizer.proj."),
)
SCALE = 1024
"""Pixels over which the released scripts spread positions; the class itself starts without."""
RESIZE_AFTER = 7


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Latent and mask tokens, a table of bit vectors, and a pixel head outside the decoder."""
    return {"encoder.latent_tokens", "decoder.mask_tokens", "quantizer.embed", "to_pixel.weight"} <= set(tensors)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and weights of an official auto-encoder; sizes come from the tensors.

    From the configuration come what no tensor shows: the block at which the resolution changes, the axes of the rotary
    table, `train_temp`, and (`bae_scale`, of the scripts' model configuration) the range of positions.
    """
    bits, dim = tensors["quantizer.embed"].shape
    head = tensors["encoder.transformer_blocks.0.attn.norm_q.weight"].shape[0]
    repa = tensors.get("decoder.repa_proj.3.weight")
    ours: dict[str, Any] = {
        "patch_size": tensors["encoder.patch_embedder.weight"].shape[-1],
        "num_tokens": tensors["encoder.latent_tokens"].shape[1],
        "encoder": _size(tensors, "encoder", _index(config, "downsample_idx")),
        "decoder": _size(tensors, "decoder", _index(config, "upsample_idx")),
        "quantizer": {"name": "binary", "dim": dim, "num_bits": bits},
        "axes": tuple(config.get("axes_dims_rope", (head // 8, (head - head // 8) // 2, (head - head // 8) // 2))),
        "scale": config.get("bae_scale", SCALE),
        "repa_dim": None if repa is None else repa.shape[0],
    }
    if "train_temp" in config:
        ours["quantizer"]["train_temperature"] = float(config["train_temp"])
    return "instella", ours, rename(_fused(tensors), RULES)


def _index(config: Mapping[str, Any], key: str) -> int:
    found = config.get(key, RESIZE_AFTER)
    return int(found[0]) if isinstance(found, (list, tuple)) else int(found)


def _size(tensors: Mapping[str, Tensor], part: str, resize_after: int) -> dict[str, int]:
    first = f"{part}.transformer_blocks.0."
    depth = len({k.split(".")[2] for k in tensors if k.startswith(f"{part}.transformer_blocks.")})
    head, width = tensors[f"{first}attn.norm_q.weight"].shape[0], tensors[f"{first}input_layernorm.weight"].shape[0]
    return {"depth": depth, "heads": width // head, "head_dim": head, "resize_after": resize_after}


def _fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One matrix for query, key and value, one for gate and value of the perceptron; single tables without a batch."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        stem = key.rpartition(".attn.")[0] or key.rpartition(".mlp.")[0]
        if key.endswith((".k_proj.weight", ".v_proj.weight", ".up_proj.weight")):
            continue
        if key.endswith(".q_proj.weight"):
            parts = [tensors[f"{stem}.attn.{name}_proj.weight"] for name in "qkv"]
            found[f"{stem}.attn.qkv.weight"] = torch.cat(parts)
        elif key.endswith(".gate_proj.weight"):
            found[f"{stem}.mlp.w12.weight"] = torch.cat([value, tensors[f"{stem}.mlp.up_proj.weight"]])
        else:
            found[key] = value[0] if key in ("encoder.latent_tokens", "decoder.mask_tokens") else value
    return found


FORMATS.append(Format("Instella-T2I (AMD-AIG-AIMA/Instella-T2I)", recognises, convert))
preset(
    "tokenizer",
    "instella_1024.laion",
    builder="instella",
    config={"quantizer": {"name": "binary", "dim": 768, "num_bits": 64}},
    weights=Weights(
        hub="amd/Instella-T2I",
        filename="bae/model.safetensors",
        licence_code="RESEARCH-ONLY RAIL-MS: no commercial use",
        licence_weights="RESEARCH-ONLY RAIL-MS: no commercial use",
        trained_on="not stated for the tokenizer (its generators: LAION-COCO and synthetic pictures)",
    ),
)
