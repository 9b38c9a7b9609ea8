"""Tiny random vision transformers of three libraries, and a slow ToMe written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.plugins.hosts import picture
from vistok.compress.match import bipartite

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 7}


def sharpen(model: nn.Module) -> Any:
    """Random weights, LayerScale and biases included, with attention that is far from uniform."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.ndim > 1
        scale = 1.5 / max(parameter[0].numel(), 1) ** 0.5 if matrix else 0.3
        parameter.data = noise * scale + ("norm" in name and name.endswith("weight"))
    return model.eval().requires_grad_(False)


def vit(**changes: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**SMALL, **changes})


def eva(**changes: Any) -> Any:
    from timm.models.eva import Eva

    return Eva(**{**SMALL, "use_rot_pos_emb": True, "use_abs_pos_emb": False, "init_values": 0.1, **changes})


def timm_blocks(name: str) -> Any:
    import timm.models.vision_transformer as module

    return vit(block_fn=getattr(module, name))


def open_clip(**changes: Any) -> Any:
    from open_clip.transformer import VisionTransformer

    size = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 4, "heads": 4, "mlp_ratio": 2.0, "output_dim": 8}
    return VisionTransformer(**{**size, **changes})


def hugging(name: str, **changes: Any) -> Any:
    import transformers

    config = getattr(transformers, name.removesuffix("Model") + "Config")
    size = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 4,
    }  # fmt: skip
    return getattr(transformers, name)(config(**{**size, **changes}))


def distilled() -> Any:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**SMALL)


def idefics3() -> Any:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionTransformer

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return Idefics3VisionTransformer(Idefics3VisionConfig(**size, image_size=32, patch_size=4))


TOWERS: dict[str, Callable[[], Any]] = {
    "timm": vit,
    "timm, LayerScale": lambda: vit(init_values=0.3),
    "timm, registers": lambda: vit(reg_tokens=4, no_embed_class=True),
    "timm, distilled": distilled,
    "timm, mean of patches": lambda: vit(global_pool="avg", class_token=False),
    "timm, mean and largest": lambda: vit(global_pool="avgmax", fc_norm=False),
    "timm, attention pool": lambda: vit(global_pool="map", class_token=False),
    "timm, normed queries": lambda: vit(qk_norm=True, scale_attn_norm=True),
    "timm, norm after": lambda: timm_blocks("ResPostBlock"),
    "timm, parallel": lambda: timm_blocks("ParallelScalingBlock"),
    "timm, EVA": eva,
    "timm, EVA, mixed": lambda: eva(rope_type="mixed", attn_type="rope"),
    "open_clip": open_clip,
    "open_clip, LayerScale, mean": lambda: open_clip(ls_init_value=0.3, pool_type="avg"),
    "open_clip, normed queries": lambda: open_clip(qk_norm=True, scale_heads=True, scale_attn=True),
    "open_clip, attention pool": lambda: open_clip(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
    "CLIP": lambda: hugging("CLIPVisionModel"),
    "SigLIP": lambda: hugging("SiglipVisionModel"),
    "Idefics3": idefics3,
    "DINOv2": lambda: hugging("Dinov2Model", mlp_ratio=2, layerscale_value=0.3),
    "DINOv2, registers": lambda: hugging("Dinov2WithRegistersModel", mlp_ratio=2, num_register_tokens=3),
    "InternVL": lambda: hugging("InternVLVisionModel", image_size=[32, 32], patch_size=[4, 4], use_qk_norm=True),
}


def tower(name: str) -> Any:
    return sharpen(TOWERS[name]())


def pixels(batch: int = 2, seed: int = 0) -> Tensor:
    return picture(batch, 3, 32, 32, seed=seed)


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """What a user takes from a tower: the pooled output."""
    out: Any = model(x)
    if isinstance(out, Tensor):
        return out
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state.mean(1) if pooled is None else pooled


def slow_tome(model: Any, x: Tensor, r: int, *, scales: bool = True, turns: bool = True) -> Tensor:
    """ToMe on a timm model by hand: explicit softmax, rotary positions gathered, LayerScale; tokens after the norm.

    Args:
        model: `vit()` or `eva()`.
        x: Pixels.
        r: Pairs per block.
        scales: Use LayerScale, which released ToMe drops.
        turns: Move rotary positions with the tokens; otherwise the first ones of the table are used.
    """
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    rotary = hasattr(model, "rope")
    embedded = model._pos_embed(model.patch_embed(x))
    x, rope = embedded if rotary else (embedded, None)
    prefix = model.num_prefix_tokens
    sizes, place = torch.ones(x.shape[:2]), torch.arange(x.shape[1] - prefix).expand(len(x), -1)
    for block in model.blocks:
        attn, h = block.attn, block.norm1(x)
        bias = None
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        qkv = nn.functional.linear(h, attn.qkv.weight, attn.qkv.bias if bias is None else bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        metric = k.mean(1)
        if rope is not None:
            at = place if turns else torch.arange(place.shape[1]).expand_as(place)
            table = rope[at].unsqueeze(1)
            q, k = (torch.cat([t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], table)], dim=2) for t in (q, k))
        logits = q @ k.transpose(2, 3) * attn.scale + sizes.log()[:, None, None]
        out = attn.proj(attn.norm((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = x + out * (_gamma(block, 1) if scales else 1)
        found = bipartite(metric, r, prefix=prefix, sizes=sizes)
        x, place = found.dense() @ x, place.gather(1, found.index[:, prefix:] - prefix)
        sizes = found.sizes
        x = x + block.mlp(block.norm2(x)) * (_gamma(block, 2) if scales else 1)
    return model.norm(x)


def _gamma(block: Any, number: int) -> Any:
    scale = getattr(block, f"ls{number}", None)
    gamma = getattr(block, f"gamma_{number}", None) if scale is None else getattr(scale, "gamma", None)
    return 1 if gamma is None else gamma
