"""Checkpoints of AURORA's depth VQ-VAE (mahtabbigverdi/Aurora-perception, a fork of All in Tokens)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.tokenizers.official import FORMATS, Converted, Format, Rules, rename

RULES: Rules = (
    (r"^_vq_vae\._embedding(\.weight)?$", "quantizer.codebook"),
    (r"^_vq_vae\._ema_cluster_size$", "quantizer.cluster_size"),
    (r"^_vq_vae\._ema_w$", "quantizer.codebook_sum"),
)


def _bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("module."): v for k, v in tensors.items()}


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """The EMA tables beside an encoder of one input channel, with or without the prefix of a DDP wrapper."""
    found = _bare(tensors)
    first = found.get("encoder.0.weight")
    return {"_vq_vae._embedding", "_vq_vae._ema_w"} <= set(found) and first is not None and first.shape[1] == 1


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and keys; all sizes but the picture's come from the tensors (`image_size` 320 if not given)."""
    found = _bare(tensors)
    at_level = [v for k, v in found.items() if k.startswith("encoder.") and k.endswith(".weight") and v.shape[-1] == 4]
    blocks = {k.split(".")[1] for k in found if k.startswith("encoder.") and ".net." in k}
    size, dim = found["_vq_vae._embedding"].shape
    section = config.get("model", config)
    ours = {
        "image_size": int(section.get("image_size", 320)),
        "downsample_ratio": 2 ** len(at_level),
        "hidden_dim": found["encoder.0.weight"].shape[0],
        "num_resnet_blocks": len(blocks),
        "residual": "v2" if any(k.endswith("running_mean") for k in found) else "v1",
        "quantizer": {
            "name": "vq_ema",
            "codebook_size": size,
            "dim": dim,
            "decay": 0.99,
            "initial_count": 0.0,
            "commitment_weight": 0.25,
        },
    }
    return "depth_vqvae", ours, rename(found, RULES) | {"quantizer.ready": torch.tensor(True)}


FORMATS.append(Format("AURORA depth VQ-VAE (mahtabbigverdi/Aurora-perception)", recognises, convert))
