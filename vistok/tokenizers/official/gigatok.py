"""Official GigaTok checkpoints (SilentView/GigaTok): keys, configurations, presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.hub import LoadError
from vistok.registry import Weights, preset
from vistok.tokenizers.official import FORMATS, Converted, Format, Rules, rename

RULES: Rules = (
    (r"^s2to1encoder\.|^s2dencoder\.", "to_tokens."),
    (r"^s1to2decoder\.distill_mlp\.|^s2ddecoder\.distill_mlp\.", "semantic."),
    (r"^s1to2decoder\.|^s2ddecoder\.", "to_map."),
    (r"\.latent_token_positional_embedding$", ".latent_position"),
    (r"\.positional_embedding$", ".position"),
    (r"\.(encoder|decoder)_embed\.", ".embed."),
    (r"\.ln_pre\.", ".norm_pre."),
    (r"\.ln_post\.", ".norm_post."),
    (r"\.global_proj\.", ".query_proj."),
    (r"^(to_tokens|to_map)\.conv_out\.", r"\1.head."),
    (r"\.transformer\.(\d+)\.", r".transformer.blocks.\1."),
    (r"\.multihead_attn\.", ".cross_attn."),
    (r"_attn\.in_proj_", "_attn.qkv."),
    (r"_attn\.out_proj\.", "_attn.proj."),
    (r"\.linear1\.", ".mlp.fc1."),
    (r"\.linear2\.", ".mlp.fc2."),
    (r"^(encoder|decoder)\.mid\.", r"\1.middle."),
    (r"^(encoder|decoder)\.conv_blocks\.(\d+)\.res\.", r"\1.levels.\2.blocks."),
    (r"^encoder\.conv_blocks\.(\d+)\.downsample\.conv\.", r"encoder.levels.\1.shrink."),
    (r"^decoder\.conv_blocks\.(\d+)\.upsample\.conv1\.", r"decoder.levels.\1.grow."),
    (r"^decoder\.adaptive\.(\d+)\.", r"decoder.levels.\1.adapt."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"^quantize\.", "quantizer."),
    (r"^quant_conv\.", "quant_proj."),
    (r"^post_quant_conv\.", "code_proj."),
)
PLAIN: Rules = ((r"\.self_attn\.", ".attn."),)
DROPPED = ("quantize.codebook_used",)


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """The transformers of either variant around a projection to the code book."""
    sides = (
        {"s2to1encoder.positional_embedding", "s1to2decoder.positional_embedding"},
        {"s2dencoder.positional_embedding", "s2ddecoder.positional_embedding"},
    )
    return "quant_conv.weight" in tensors and any(side <= set(tensors) for side in sides)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and keys of an official GigaTok checkpoint.

    Sizes come from the tensors. What does not show there is read from the configuration, wherever it is nested; without
    one it is what all published models have: rotation trick on, unit vectors, semantic features after layer 3.

    Raises:
        LoadError: Options that no published model has.
    """
    is_1d = "s2to1encoder.positional_embedding" in tensors
    encoder, decoder = ("s2to1encoder", "s1to2decoder") if is_1d else ("s2dencoder", "s2ddecoder")
    _refuse(config, tensors)
    table = tensors["quantize.embedding.weight"]
    side = math.isqrt(tensors[f"{encoder}.positional_embedding"].shape[0])
    levels = len({k.split(".")[2] for k in tensors if k.startswith("encoder.conv_blocks.")})
    base = tensors["encoder.conv_in.weight"].shape[0]
    entropy = float(_setting(config, "entropy_loss_ratio", 0.0))
    ours: dict[str, Any] = {
        "image_size": side * 2 ** (levels - 1),
        "encoder": _size(tensors, encoder),
        "decoder": _size(tensors, decoder),
        "quantizer": {
            "name": "vq",
            "codebook_size": table.shape[0],
            "dim": table.shape[1],
            "l2_norm": bool(_setting(config, "codebook_l2_norm", True)),
            "gradient": "rotation" if _setting(config, "rot", True) else "straight_through",
            "commitment_weight": float(_setting(config, "commit_loss_beta", 0.25)),
            **({"entropy_weight": entropy} if entropy else {}),
        },
        "channels": base,
        "multipliers": [tensors[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] // base for i in range(levels)],
        "inner": tensors["quant_conv.weight"].shape[1],
        "semantic_layer": int(_setting(config, "distill_depth", None) or 3),
        "semantic_dim": None,
    }
    last = f"{decoder}.distill_mlp.4.weight"
    if last in tensors:
        ours["semantic_dim"] = tensors[last].shape[0]
    rules: Rules = RULES
    if is_1d:
        ours["num_tokens"] = tensors[f"{encoder}.latent_token_positional_embedding"].shape[0]
    else:
        plain = f"{encoder}.transformer.0.multihead_attn.in_proj_weight" not in tensors
        ours["layer"] = "plain" if plain else "query"
        rules = (
            (*PLAIN, *RULES, (r"\.attn\.in_proj_", ".attn.qkv."), (r"\.attn\.out_proj\.", ".attn.proj."))
            if plain
            else RULES
        )
    kept = {k: _plain(k, v) for k, v in tensors.items() if k not in DROPPED}
    return "gigatok" if is_1d else "gigatok_2d", ours, rename(kept, rules)


def _plain(key: str, value: Tensor) -> Tensor:
    """Tables without their axis of length one, 1x1 convolutions as matrices."""
    if key.endswith("positional_embedding"):
        return value[:, 0]
    one_by_one = key in ("quant_conv.weight", "post_quant_conv.weight") or key.endswith("encoder.conv_out.weight")
    return value.flatten(1) if one_by_one and value.shape[2:] == (1, 1) else value


def _setting(config: Any, key: str, default: Any) -> Any:
    """A setting by name, at any depth of the configuration; the default if it is absent or null."""
    if isinstance(config, Mapping):
        if config.get(key) is not None:
            return config[key]
        for value in config.values():
            found = _setting(value, key, None)
            if found is not None:
                return found
    return default


def _size(tensors: Mapping[str, Tensor], part: str) -> dict[str, int]:
    width = tensors[f"{part}.ln_post.weight"].shape[0]
    depth = len({k.split(".")[2] for k in tensors if k.startswith(f"{part}.transformer.")})
    return {"width": width, "depth": depth, "heads": width // 64}


def _refuse(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    wanted = {"adaptive_gn": True, "d2s_up": True, "use_attn": False, "use_qk_norm": False}
    for key, value in wanted.items():
        if bool(_setting(config, key, value)) != value:
            raise LoadError(
                f"This GigaTok has {key} {not value}, which no published one has and vistok does not build."
            )
    if "s2to1encoder.positional_embedding" in tensors and not _setting(config, "multi_level_query_init", True):
        raise LoadError("This GigaTok has multi_level_query_init False, which no published one has.")


FORMATS.append(Format("GigaTok (SilentView/GigaTok)", recognises, convert))

_VQ = {"name": "vq", "codebook_size": 16384, "dim": 8, "l2_norm": True, "gradient": "rotation"}
for _name, _file, _encoder, _decoder, _rfid, _lpips in (
    ("ss", "VQ_SS256_e100.pt", "small", "small", 1.01, 0.2226),
    ("sb", "VQ_SB256_e200.pt", "small", "base", 0.89, 0.2121),
    ("bl", "VQ_BL256_e200.pt", "base", "large", 0.81, 0.2059),
    ("bl_dino_disc", "VQ_BL256_dino_disc.pt", "base", "large", 0.51, 0.2056),
    ("xl_xxl", "VQ_XLXXL256_e300.pt", "xl", "xxl", 0.79, 0.1947),
):
    preset(
        "tokenizer",
        f"gigatok_{_name}.in1k",
        builder="gigatok",
        config={
            "encoder": _encoder,
            "decoder": _decoder,
            "quantizer": _VQ | ({"entropy_weight": 0.005} if _name == "xl_xxl" else {}),
        },
        weights=Weights(
            hub="",
            filename=_file,
            licence_code="MIT",
            licence_weights="MIT (one licence file for both; trained on ImageNet)",
            trained_on="ImageNet-1k",
            figures={"rFID": _rfid, "LPIPS": _lpips},
            source="README of github.com/SilentView/GigaTok, with the links (ImageNet-val 50k, 256 px)",
            protocol="adm_originals",
        ),
    )
for _name, _encoder, _decoder, _layer in (
    ("ss", "small", "small", "query"),
    ("sb", "small", "base", "plain"),
    ("bl", "base", "large", "plain"),
):
    preset(
        "tokenizer",
        f"gigatok_2d_{_name}",
        builder="gigatok_2d",
        config={"encoder": _encoder, "decoder": _decoder, "layer": _layer, "quantizer": _VQ},
    )
