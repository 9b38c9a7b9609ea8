"""Official WeTok checkpoints (zhuangshaobin/WeTok): Lightning files with averaged weights, YAML, presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vistok.hub import LoadError
from vistok.registry import Weights, preset
from vistok.tokenizers.official import FORMATS, Converted, Format

EMA = "model_ema."
PARTS = ("encoder.", "decoder.")
BITS_PER_GROUP = 8
"""Of every published model."""


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """An encoder and a decoder with adaptive group norms by level, and no codebook."""
    return {
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid_block.0.conv1.weight",
        "decoder.adaptive.0.gamma.weight",
        "decoder.up.0.block.0.conv1.weight",
    } <= set(tensors)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and weights of an official WeTok checkpoint; sizes come from the tensors, groups from the YAML.

    Averaged weights (`model_ema.*`, names without dots) replace the plain ones where there are any: in second-stage
    files there are none of the frozen encoder.
    """
    state = averaged(tensors)
    channels, bits = state["encoder.conv_in.weight"].shape[0], state["encoder.conv_out.weight"].shape[0]
    levels, blocks = _count(state, "encoder.down."), _count(state, "encoder.down.0.block.")
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    ours = {
        "image_size": _image_size(config),
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "quantizer": {"name": "group_lfq", "dim": bits, "groups": _groups(config, bits)},
        "generative": state["decoder.conv_in.weight"].shape[1] == 2 * bits,
    }
    return "wetok", ours, state


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoder and decoder with their averaged weights; losses, discriminator and counters left out."""
    state = {key: value for key, value in tensors.items() if key.startswith(PARTS)}
    names = {key.replace(".", ""): key for key in state}
    for key, value in tensors.items():
        flat = key.removeprefix(EMA)
        if key.startswith(EMA) and flat in names:
            state[names[flat]] = value
    return state


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the model's class, which Lightning's and the projects' own YAML nest differently."""
    found: Any = config
    for key in ("model", "init_args", "params"):
        inner = found.get(key)
        found = inner if isinstance(inner, Mapping) else found
    return found


def _groups(config: Mapping[str, Any], bits: int) -> int:
    model = _section(config)
    groups, codes = model.get("num_codebooks"), model.get("n_embed")
    if groups is None:
        width = BITS_PER_GROUP if codes is None else round(math.log2(int(codes)))
        groups = bits // width if bits % width == 0 else 1
    if bits % int(groups) or (codes is not None and 2 ** (bits // int(groups)) != int(codes)):
        raise LoadError(
            f"The configuration says {groups} groups of {codes} codes, but the encoder gives {bits} bits per token."
        )
    return int(groups)


def _image_size(config: Mapping[str, Any]) -> int:
    found: Any = config
    for key in ("data", "init_args", "validation", "params", "config", "size"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return int(found) if found else 256


FORMATS.append(Format("WeTok (zhuangshaobin/WeTok)", recognises, convert))


def _enter(name: str, file: str, data: str, multipliers: tuple[int, ...], groups: int, **extra: Any) -> None:
    figures = extra.pop("figures", {})
    preset(
        "tokenizer",
        f"wetok_{name}",
        builder="wetok",
        config={
            "multipliers": multipliers,
            "quantizer": {"name": "group_lfq", "dim": BITS_PER_GROUP * groups, "groups": groups},
            **extra,
        },
        weights=Weights(
            hub="GrayShine/WeTok",
            filename=f"{file}/WeTok.ckpt",
            licence_code="Apache-2.0",
            licence_weights="Apache-2.0 by the repository's licence file; the hub page states no other restriction",
            trained_on=data,
            figures=figures,
            source="README and abstract of arXiv 2508.05599 (zero-shot rFID, ImageNet-val 50k, 256 px)"
            if figures
            else "",
            protocol="wetok" if figures else "",
        ),
    )


_F8, _F16, _F32 = (1, 2, 2, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 8)
_WEB = "general-domain pictures (not named)"
_enter("r24.general", "GeneralDomain/compratio24", _WEB, _F8, 8, figures={"rFID": 0.12})
_enter("r48.general", "GeneralDomain/compratio48", _WEB, _F8, 4)
_enter("r192.general", "GeneralDomain/compratio192", _WEB, _F16, 4)
_enter("r768.general", "GeneralDomain/compratio768", _WEB, _F32, 4, generative=True, figures={"rFID": 3.49})
_enter("f8.in1k", "ImageNet/downsample8", "ImageNet-1k", _F8, 4)
_enter("f16.in1k", "ImageNet/downsample16", "ImageNet-1k", _F16, 4)
