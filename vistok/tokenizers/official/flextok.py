"""Official FlexTok checkpoints (apple/ml-flextok, commit 87d00cc): keys, configurations, presets.

Their configuration is a tree of Python targets and arguments, in `config.json` or, as text, in the header of the
weights. It is read as data, for the facts that shapes do not tell; nothing in it is imported or built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.hub import LoadError
from vistok.registry import Weights, preset
from vistok.tokenizers.flextok_blocks import Size
from vistok.tokenizers.kl_vae import modern_names, shape_of
from vistok.tokenizers.official import FORMATS, Converted, Format, Rules, rename

ENCODER, DECODER, VAE = "encoder.module_dict.", "decoder.module_dict.", "vae.vae."
LEVELS = (8, 8, 8, 5, 5, 5)
HEAD_WIDTH = 64
RULES: Rules = (
    (r"^(encoder|decoder)\.module_dict\.", r"\1."),
    (r"\.(enc|dec)_transformer\.", ".transformer."),
    (r"\.enc_patch_emb\.patch_proj\.|\.dec_noise_patch_emb\.patch_proj\.", ".patch_embed.proj."),
    (r"\.enc_posemb_module\.posembs$|\.dec_patches_posemb_module\.posembs$", ".patch_embed.position"),
    (r"\.enc_register_module\.registers$", ".registers"),
    (r"\.enc_to_latents\.proj\.|\.dec_to_patches\.proj\.", ".head."),
    (r"\.dec_from_latents\.proj\.", ".embed."),
    (r"\.dec_registers_posemb_module\.posembs$", ".position"),
    (r"\.dec_nested_dropout\.dropout_mask_token$", ".mask_token"),
    (r"\.dec_latent_dropout\.nullcond$", ".null_token"),
    (r"\.dec_time_embedder\.", ".time."),
    (r"\.dec_to_patches\.adaLN_modulation\.", ".head_modulation."),
    (r"\.adaLN_modulation\.", ".modulation."),
    (r"\.attn\.proj\.", ".proj."),
    (r"\.mlp\.fc2\.", ".mlp.w3."),
    (r"^vae\.vae\.", "frontend.vae."),
)
FUSED = {"qkv": ("attn.wq", "attn.wk", "attn.wv"), "mlp.w12": ("mlp.fc1", "mlp.fc3")}


def find(tree: Any, *names: str) -> Any:
    """The first value under one of `names` anywhere in a tree of mappings and lists, in order; None if nowhere."""
    return next((value for key, value in _walk(tree) if key in names and value is not None), None)


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        yield from tree.items()
        for value in tree.values():
            yield from _walk(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _walk(value)


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Registers of an encoder and the mask vector of a nested dropout, under `module_dict`."""
    return {f"{ENCODER}enc_register_module.registers", f"{DECODER}dec_nested_dropout.dropout_mask_token"} <= set(
        tensors
    )


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and keys of an official FlexTok checkpoint; sizes come from the tensors.

    The configuration gives the VAE's scale, groups and posterior sampling, the FSQ levels and the law of the nested
    dropout; without one these are 1, 32, off, the published levels, and uniform.

    Raises:
        LoadError: A module this version does not know, or levels that do not fit the code width.
    """
    tree = config.get("config", config)
    vae = {k.removeprefix(VAE): v for k, v in tensors.items() if k.startswith(VAE)}
    facts = tree.get("vae", tree) if isinstance(tree, Mapping) else {}
    front = shape_of(
        {name: find(facts, name) for name in ("scaling_factor", "shift_factor")}
        | {"norm_num_groups": find(facts, "norm_num_groups") or 32},
        vae,
        "The checkpoint",
    )
    table = tensors[f"{ENCODER}enc_posemb_module.posembs"].shape[2:]
    patch = math.isqrt(tensors[f"{ENCODER}enc_patch_emb.patch_proj.weight"].shape[1] // front.latent_channels)
    step = patch * 2 ** (len(front.channels) - 1)
    ours: dict[str, Any] = {
        "image_size": (table[0] * step, table[1] * step),
        "patch_size": patch,
        "num_tokens": tensors[f"{ENCODER}enc_register_module.registers"].shape[0],
        "encoder": _size(tensors, f"{ENCODER}enc_transformer."),
        "decoder": _size(tensors, f"{DECODER}dec_transformer."),
        "quantizer": {"name": "fsq", "levels": _levels(tree, tensors)},
        "vae": {**{k: v for k, v in vars(front).items() if k != "path"}, "sample_posterior": _posterior(facts)},
        "table": tuple(table),
        "nested_dropout": find(tree, "size_sampling_mode") or "uniform",
        "learned_null": f"{DECODER}dec_latent_dropout.nullcond" in tensors,
        "head_modulation": f"{DECODER}dec_to_patches.adaLN_modulation.1.weight" in tensors,
    }
    ours["repa_layer"] = min(1, ours["decoder"]["depth"] - 1)
    rest = {k: v for k, v in tensors.items() if not k.startswith(VAE)}
    rest |= {f"{VAE}{k}": v for k, v in modern_names(vae).items()}
    return "flextok", ours, rename(_reshaped(_fuse(rest)), RULES)


def _size(tensors: Mapping[str, Tensor], stack: str) -> dict[str, int]:
    width = tensors[f"{stack}blocks.0.attn.wq.weight"].shape[0]
    depth = len({k.removeprefix(stack).split(".")[1] for k in tensors if k.startswith(stack)})
    return vars(Size(width=width, depth=depth, heads=width // HEAD_WIDTH))


def _levels(tree: Any, tensors: Mapping[str, Tensor]) -> list[int]:
    dim = tensors[f"{ENCODER}enc_to_latents.proj.weight"].shape[0]
    found = find(tree.get("regularizer", tree), "levels") if isinstance(tree, Mapping) else None
    levels = [int(n) for n in (LEVELS if found is None else found)]
    if len(levels) != dim:
        raise LoadError(
            f"This FlexTok has codes of {dim} channels, and its FSQ levels are {levels}: config.json is off."
        )
    return levels


def _posterior(facts: Any) -> bool:
    """Ids are the posterior's mode unless the file asks otherwise; the wrapper's own default would make them random."""
    return bool(find(facts, "sample_posterior") or False)


def _fuse(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Separate projections of a block as the fused ones here."""
    fused = dict(tensors)
    for key in tensors:
        if key.endswith("attn.wq.weight"):
            block = key.removesuffix("attn.wq.weight")
            for name, parts in FUSED.items():
                fused[f"{block}{name}.weight"] = torch.cat([fused.pop(f"{block}{part}.weight") for part in parts])
    return fused


def _reshaped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables without their batch dimensions; the 1D one with positions first."""
    found = dict(tensors)
    for key, value in tensors.items():
        if key.endswith("dec_registers_posemb_module.posembs"):
            found[key] = value[0, 0].T.contiguous()
        elif key.endswith(".posembs"):
            found[key] = value[0]
    return found


FORMATS.append(Format("FlexTok (apple/ml-flextok)", recognises, convert))

_FSQ = {"name": "fsq", "levels": list(LEVELS)}
_KL16: dict[str, Any] = {"channels": [128, 256, 512, 512], "latent_channels": 16}


def _enter(name: str, encoder: Any, decoder: Any, tag: str = "", figures: Mapping[str, float] | None = None) -> None:
    config = {"encoder": encoder, "decoder": decoder, "quantizer": _FSQ, "vae": _KL16}
    data = {"in1k": "ImageNet-1k", "dfn": "DFN"}.get(tag, "")
    weights = Weights(
        hub=f"EPFL-VILAB/{name}_{tag}",
        licence_code="Apple sample code licence",
        licence_weights="Apple Machine Learning Research Model licence (research only, no commercial use)",
        trained_on=data,
        figures=figures or {},
        source="later papers' tables at 32 tokens (rFID: ImageNet-val 50k, 256 px; 25 steps, APG 7.5)",
        options=" --tokens 32",
    )
    full = f"{name}.{tag}" if tag else name
    preset("tokenizer", full, builder="flextok", config=config, weights=weights if tag else None)


_enter("flextok_d12_d12", "d12", "d12", "in1k", {"rFID": 4.20})
_enter("flextok_d18_d18", "d18", "d18", "in1k", {"rFID": 1.61})
_enter("flextok_d18_d28", "d18", "d28", "in1k", {"rFID": 1.45})
_enter("flextok_d18_d28", "d18", "d28", "dfn")
_D8 = {"width": 512, "depth": 8, "heads": 8}
_enter("flextok_d8_d8", _D8, _D8)  # never published: the smallest of this scheme that is worth timing
