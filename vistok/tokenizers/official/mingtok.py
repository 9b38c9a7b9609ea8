"""Official MingTok checkpoints (inclusionAI/Ming-UniVision): keys, configuration, preset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.flow import FlowHead
from vistok.hub import LoadError, load_strictly
from vistok.registry import Weights, preset
from vistok.tokenizers.official import FORMATS, Converted, Format, Rules, rename

MEAN, SCALE = 1.46817409, 8.09449291
RULES: Rules = (
    (r"\.blocks\.0\.(\d+)\.", r".blocks.\1."),
    (r"^low_level_encoder\.", "encoder."),
    (r"^encoder\.cls_token$", "encoder.class_token"),
    (r"^encoder\.pos_embed$", "encoder.position"),
    (r"^encoder\.patch_embed\.proj\.", "encoder.patch_embed."),
    (r"^encoder\.out_norm\.", "encoder.norm."),
    (r"^encoder\.out_proj\.", "encoder.head."),
    (r"^semantic_decoder\.in_proj\.", "semantic.embed."),
    (r"^semantic_decoder\.", "semantic."),
    (r"^pixel_decoder\.", "pixels."),
    (r"^sem_to_pix\.", "pixels.connector."),
)

HEAD_RULES: Rules = (
    (r"^(model\.diffloss\.)?net\.", ""),
    (r"^time_embed\.", "time."),
    (r"^cond_embed\.", "condition."),
    (r"^input_proj\.", "embed."),
    (r"^final_layer\.linear\.", "head."),
    (r"^final_layer\.", ""),
    (r"^res_blocks\.", "blocks."),
    (r"\.in_ln\.", ".norm."),
    (r"adaLN_modulation\.", "modulation."),
)
HEAD_MARK = "net.input_proj.weight"


def load_head(tensors: Mapping[str, Tensor]) -> FlowHead:
    """The flow head of Ming-UniVision from its tensors (`model.diffloss.net.*` or `net.*`; others are left out).

    Raises:
        LoadError: No such head among them, or one that does not fit.
    """
    found = {k: v for k, v in tensors.items() if k.startswith(("net.", "model.diffloss.net."))}
    if not any(k.endswith(HEAD_MARK) for k in found):
        raise LoadError(
            "There is no flow head of Ming-UniVision among these tensors (no key ends with net.input_proj)."
        )
    ours = rename(found, HEAD_RULES)
    width, channels = ours["embed.weight"].shape
    head = FlowHead(
        channels=channels,
        condition=ours["condition.weight"].shape[1],
        width=width,
        depth=len({k.split(".")[1] for k in ours if k.startswith("blocks.")}),
        ratio=1.5 * ours["blocks.0.mlp.w3.weight"].shape[1] / width,
    )
    load_strictly(head, ours, "This flow head")
    return head.eval()


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """A low-level encoder, a semantic decoder and the connector between it and the pixels."""
    return {"low_level_encoder.pos_embed", "semantic_decoder.in_proj.weight", "sem_to_pix.weight"} <= set(tensors)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and keys of an official MingTok; sizes come from the tensors, mean and scale from the file.

    Where the file does not state mean and scale they are the published ones. The frozen teachers that training
    checkpoints carry (`target_backbone*`) are left out.
    """
    config = config.get("config", config)
    kept = {k: v for k, v in tensors.items() if not k.startswith("target_backbone")}
    patch = kept["low_level_encoder.patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(kept["low_level_encoder.pos_embed"].shape[1] - 1)
    mean, scale = config.get("mean"), config.get("scaling_factor")
    ours: dict[str, Any] = {
        "image_size": side * patch,
        "patch_size": patch,
        "latent_dim": kept["semantic_decoder.in_proj.weight"].shape[1],
        "encoder": _stack(kept, "low_level_encoder"),
        "semantic": _stack(kept, "semantic_decoder"),
        "pixels": _stack(kept, "pixel_decoder"),
        "pixel_patch": math.isqrt(kept["pixel_decoder.head.weight"].shape[0] // 3),
        "mean": MEAN if mean is None else float(mean),
        "scale": SCALE if scale is None else float(scale),
    }
    kept["low_level_encoder.cls_token"] = kept["low_level_encoder.cls_token"][0]
    kept["low_level_encoder.pos_embed"] = kept["low_level_encoder.pos_embed"][0]
    return "mingtok", ours, rename(kept, RULES)


def _stack(tensors: Mapping[str, Tensor], part: str) -> dict[str, int]:
    width = tensors[f"{part}.blocks.0.0.norm1.weight"].shape[0]
    depth = len({k.split(".")[3] for k in tensors if k.startswith(f"{part}.blocks.")})
    return {"width": width, "depth": depth}


FORMATS.append(Format("MingTok (inclusionAI/Ming-UniVision)", recognises, convert))
preset(
    "tokenizer",
    "mingtok_vision",
    builder="mingtok",
    config={
        "encoder": {"width": 768, "depth": 12},
        "semantic": {"width": 1024, "depth": 24},
        "pixels": {"width": 1024, "depth": 24},
        "mean": MEAN,
        "scale": SCALE,
    },
    weights=Weights(
        hub="inclusionAI/MingTok-Vision",
        licence_code="MIT (layers from DINOv2, Apache-2.0)",
        licence_weights="see the model card (not seen by us)",
        trained_on="not published",
        figures={"rFID": 0.54},
        source="table of arXiv 2510.06590 (ImageNet-val 50k, 512 px); its PSNR of 30.8 dB follows another convention",
    ),
)
