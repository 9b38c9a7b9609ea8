"""Official TiTok and TA-TiTok checkpoints (bytedance/1d-tokenizer, commit 942a96f): keys, configurations, presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.hub import LoadError
from vistok.registry import Weights, preset
from vistok.tokenizers.official import FORMATS, Converted, Format, Rules, rename

RULES: Rules = (
    (r"^latent_tokens$", "encoder.latents"),
    (r"\.class_embedding$", ".class_token"),
    (r"^(encoder|decoder)\.positional_embedding$", r"\1.position"),
    (r"\.latent_token_positional_embedding$", ".latent_position"),
    (r"\.ln_pre\.", ".norm_pre."),
    (r"\.ln_post\.", ".norm_post."),
    (r"\.transformer\.(\d+)\.", r".transformer.blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^encoder\.conv_out\.", "encoder.head."),
    (r"^decoder\.decoder_embed\.", "decoder.embed."),
    (r"^quantize\.", "quantizer."),
    (r"^decoder\.text_guidance_proj\.", "decoder.text_proj."),
    (r"^decoder\.text_guidance_positional_embedding$", "decoder.text_position"),
    (r"^pixel_quantize\.embedding\.", "pixel_codebook."),
)
TWO_STAGE_HEAD: Rules = ((r"^decoder\.ffn\.0\.", "head.fc1."), (r"^decoder\.ffn\.2\.", "head.fc2."))
PIXEL_HEAD: Rules = ((r"^decoder\.ffn\.0\.", "head.to_patch."), (r"^decoder\.conv_out\.", "head.smooth."))
_TEXT = "decoder.text_guidance_proj.weight"
MASKGIT_RULES: Rules = ((r"^quantize\.", "quantizer."),)


def _section(config: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """A section of the nested configuration, empty if there is none."""
    found: Any = config.get("config", config)
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _model(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The model's section; what all published weights of that kind have in common for a file without a configuration.

    The two-stage models have the legacy layout and an l2-normalised codebook, the single-stage ones neither.
    """
    if config:
        return _section(config, "model", "vq_model")
    two_stage, continuous = "decoder.ffn.2.weight" in tensors, "quantize.embedding.weight" not in tensors
    width = tensors["encoder.conv_out.weight"].shape[0]
    return {
        "num_latent_tokens": tensors["latent_tokens"].shape[0],
        "is_legacy": two_stage,
        "use_l2_norm": two_stage,
        "quantize_mode": "vae" if continuous else "vq",
        "token_size": width // 2 if continuous else width,
    }


def _is_nested(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a two-stage checkpoint is One-D-Piece (turingmotors/One-D-Piece), whose keys are the same.

    Its configurations say so; of the published files without one, those with 256 tokens are.
    """
    if not config:
        return tensors["latent_tokens"].shape[0] == 256
    relaxed = not _section(config, "model", "vq_model").get("strict_length_assertion", True)
    return relaxed or _section(config, "model").get("type") == "one_d_piece"


def _image_size(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    if config:
        return int(_section(config, "dataset", "preprocessing").get("crop_size", 256))
    patches = tensors["encoder.positional_embedding"].shape[0] - 1
    return math.isqrt(patches) * tensors["encoder.patch_embed.weight"].shape[-1]


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Latent tokens beside an encoder; in a folder also a nested configuration with `model.vq_model`."""
    if not {"latent_tokens", "encoder.conv_out.weight"} <= set(tensors):
        return False
    return not config or "num_latent_tokens" in _model(config, tensors)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and keys of an official TiTok checkpoint; sizes come from the tensors, not from size names.

    Raises:
        LoadError: A stage-1 checkpoint, which has no pixel decoder.
    """
    model = _model(config, tensors)
    two_stage = "decoder.ffn.2.weight" in tensors
    if two_stage and "pixel_decoder.conv_in.weight" not in tensors:
        raise LoadError(
            "This is a stage-1 TiTok checkpoint without a pixel decoder. Load a stage-2 one (it has pixel_decoder.*)."
        )
    patch = tensors["encoder.patch_embed.weight"].shape[-1]
    ours: dict[str, Any] = {
        "image_size": _image_size(config, tensors),
        "num_tokens": tensors["latent_tokens"].shape[0],
        "encoder": _size(tensors, "encoder"),
        "decoder": _size(tensors, "decoder"),
        "quantizer": _quantizer(model, tensors),
    }
    drop = {"quantize.embed_prob"} if not model.get("clustering_vq", False) else set()
    kept = {k: v for k, v in tensors.items() if k not in drop}
    kept |= {
        k: v.flatten(1)
        for k, v in kept.items()
        if k in ("encoder.conv_out.weight",) or (k.startswith("decoder.ffn.") and v.ndim == 4)
    }
    kept |= {k: v[0] for k, v in kept.items() if k == "decoder.mask_token"}
    if two_stage:
        ours["legacy_layout"] = bool(model.get("is_legacy", True))
        ours["proxy_codes"], ours["proxy_dim"] = tensors["pixel_quantize.embedding.weight"].shape
        ours["pixel_channels"] = tensors["pixel_decoder.conv_out.weight"].shape[1]
        builder = "one_d_piece" if _is_nested(config, tensors) else "titok_two_stage"
        return builder, ours, rename(kept, (*RULES, *TWO_STAGE_HEAD))
    if model.get("is_legacy", True):
        raise LoadError(
            "A single-stage TiTok checkpoint with the legacy layout was never published and is not supported."
        )
    ours |= {"patch_size": patch}
    if _TEXT not in tensors:
        return "titok", ours, rename(kept, (*RULES, *PIXEL_HEAD))
    length, dim = tensors["decoder.text_guidance_positional_embedding"].shape[0], kept[_TEXT].shape[1]
    text = {"kind": "clip", "model": "ViT-L-14-336", "pretrained": "openai", "length": length, "dim": dim}
    return "ta_titok", ours | {"text_encoder": text}, rename(kept, (*RULES, *PIXEL_HEAD))


def _size(tensors: Mapping[str, Tensor], part: str) -> dict[str, int]:
    width = tensors[f"{part}.ln_pre.weight"].shape[0]
    depth = len({k.split(".")[2] for k in tensors if k.startswith(f"{part}.transformer.")})
    return {"width": width, "depth": depth, "heads": width // 64}


def _quantizer(model: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if model.get("quantize_mode", "vq") == "vae":
        return {"name": "gaussian", "dim": int(model["token_size"])}
    size, dim = tensors["quantize.embedding.weight"].shape
    found = {"codebook_size": size, "dim": dim, "l2_norm": bool(model.get("use_l2_norm", False))}
    return {"name": "cvq" if model.get("clustering_vq", False) else "vq", **found}


def recognises_maskgit(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """A MaskGIT-VQGAN file: its encoder, codebook and decoder, with or without a configuration."""
    return {
        "encoder.down.0.block.0.conv1.weight",
        "decoder.up.0.block.0.conv1.weight",
        "quantize.embedding.weight",
    } <= set(tensors)


def convert_maskgit(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and keys of an official MaskGIT-VQGAN checkpoint; all sizes come from the tensors."""
    size, dim = tensors["quantize.embedding.weight"].shape
    ours = {"codebook_size": size, "code_dim": dim, "channels": tensors["encoder.conv_in.weight"].shape[0]}
    return "maskgit_vqgan", ours, rename(tensors, MASKGIT_RULES)


FORMATS.append(Format("TiTok (bytedance/1d-tokenizer)", recognises, convert))
FORMATS.append(Format("MaskGIT-VQGAN (bytedance/1d-tokenizer)", recognises_maskgit, convert_maskgit))


_VQ4K = {"name": "vq", "codebook_size": 4096, "dim": 12, "l2_norm": True}
_VQ8K = {"name": "vq", "codebook_size": 8192, "dim": 64, "l2_norm": False}
_KL16 = {"name": "gaussian", "dim": 16}
_SIZE = {"s": "small", "b": "base", "l": "large"}
_TABLE = "README of bytedance/1d-tokenizer at 942a96f (rFID: ImageNet-val 50k, 256 px)"


def _weights(hub: str, rfid: float, filename: str = "model.safetensors") -> Weights:
    return Weights(
        hub=hub,
        filename=filename,
        licence_code="Apache-2.0",
        licence_weights="Apache-2.0 on the hub; its README says for research purposes (trained on ImageNet)",
        trained_on="ImageNet-1k",
        figures={"rFID": rfid},
        source=_TABLE,
        protocol="titok",
    )


def _enter(name: str, builder: str, sizes: str, num_tokens: int, quantizer: dict[str, Any], rfid: float) -> None:
    config = {"num_tokens": num_tokens, "encoder": _SIZE[sizes[0]], "decoder": _SIZE[sizes[1]], "quantizer": quantizer}
    hub = f"yucornetto/tokenizer_{name}_imagenet"
    preset("tokenizer", f"{name}.in1k", builder=builder, config=config, weights=_weights(hub, rfid))


for _name, _sizes, _tokens, _rfid in (("l32", "ll", 32, 2.21), ("b64", "bb", 64, 1.70), ("s128", "ss", 128, 1.71)):
    _enter(f"titok_{_name}", "titok_two_stage", _sizes, _tokens, _VQ4K, _rfid)
for _name, _sizes, _tokens, _rfid in (("bl64", "bl", 64, 2.06), ("bl128", "bl", 128, 1.49), ("sl256", "sl", 256, 1.03)):
    _enter(f"titok_{_name}_vq8k", "titok", _sizes, _tokens, _VQ8K, _rfid)
for _name, _sizes, _tokens, _rfid in (("ll32", "ll", 32, 1.61), ("bl64", "bl", 64, 1.25), ("bl128", "bl", 128, 0.84)):
    _enter(f"titok_{_name}_vae_c16", "titok", _sizes, _tokens, _KL16, _rfid)
for _name, _sizes, _tokens, _rfid in (
    ("bl32_vq", "bl", 32, 3.95),
    ("bl64_vq", "bl", 64, 2.43),
    ("bl128_vq", "bl", 128, 1.53),
    ("bl32_vae", "bl", 32, 1.53),
    ("bl64_vae", "bl", 64, 1.47),
    ("sl128_vae", "sl", 128, 0.90),
):
    preset(
        "tokenizer",
        f"ta_titok_{_name}.datacomp",
        builder="ta_titok",
        config={
            "num_tokens": _tokens,
            "encoder": _SIZE[_sizes[0]],
            "decoder": _SIZE[_sizes[1]],
            "quantizer": _VQ8K if _name.endswith("vq") else _KL16,
        },
        weights=Weights(
            hub=f"turkeyju/tokenizer_tatitok_{_name}",
            filename="model.safetensors",
            licence_code="Apache-2.0",
            licence_weights="Apache-2.0 on the hub; its README says for research purposes (trained on DataComp)",
            trained_on="DataComp-1B, 685.8 M filtered pairs",
            figures={"rFID": _rfid},
            source="arXiv 2501.07730, table 3 (rFID: zero-shot ImageNet-val 50k, 256 px, 'A photo of a {class}.')",
            protocol="titok",
            options=" --caption 'A photo of a {class}.'",
        ),
    )
preset(
    "tokenizer",
    "maskgit_vqgan.in1k",
    builder="maskgit_vqgan",
    config={},
    weights=_weights("fun-research/TiTok", 2.28, "maskgit-vqgan-imagenet-f16-256.bin"),
)
