"""One table of all compression methods: what each does, asks for, runs on and costs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vistok.compress.budget import check_keep
from vistok.compress.method import FeatureMethod, Method
from vistok.compress.trained import TrainedMethod
from vistok.config import create
from vistok.plugins.compressed import build_for
from vistok.plugins.families.base import Family, family_of
from vistok.plugins.families.encoder import Encoder
from vistok.registry import list_names, registry

KEEP = 1 / 3
HOST = {"tower_depth": 12, "tower_width": 256, "depth": 16, "width": 512, "image": 336, "patch": 14}
DEPTH = 32
"""Layers of the language model that declarations are read for."""


def names() -> list[str]:
    """Methods, without named settings of others."""
    return [name for name in list_names("method") if registry("method").resolve(name)[2] is None]


def measure(host: Mapping[str, int] = HOST, keep: float = KEEP, methods: list[str] | None = None) -> dict[str, Any]:
    """Count the floating-point operations of a prompt with every method, on a LLaVA with random weights.

    Every matrix product, convolution and attention of tower, projector, language model and method is counted as it
    runs, prefill of one picture and 60 words; element-wise work is not.

    Args:
        host: Sizes of the host, as `HOST`.
        keep: Share of image tokens left, for the methods that take one.
        methods: Names; all by default.

    Returns:
        host, keep, image_tokens, and for every method `flops` (share of the untouched host's) and `left` (image tokens
        in the last layer), or `refused` with the reason.

    Raises:
        ValueError: `keep` is no share in (0, 1].
    """
    check_keep(keep)
    model, inputs = _host(dict(host))
    whole = _count(model, inputs, None)["flops"]
    rows: dict[str, Any] = {}
    for name in names() if methods is None else methods:
        try:
            setting = _setting(name, keep, model)
            found = _count(model, inputs, setting)
            rows[name] = {"flops": found["flops"] / whole, "left": found["left"], "settings": _plain(setting)}
        except (TypeError, ValueError) as error:
            rows[name] = {"refused": str(error)}
    image = int((inputs["input_ids"] == model.config.image_token_id).sum())
    return {"host": dict(host), "keep": keep, "image_tokens": image, "methods": rows}


def _plain(setting: Mapping[str, Any]) -> dict[str, Any]:
    """What can be stored: of a compressor its window."""
    plain = {k: v for k, v in setting.items() if k not in ("name", "compressor")}
    return plain | ({"window": setting["compressor"].window} if "compressor" in setting else {})


def _setting(name: str, keep: float, model: Any) -> dict[str, Any]:
    builder: Any = registry("method").resolve(name)[1]
    if issubclass(builder, TrainedMethod):  # untrained: it costs the same
        config = model.config.vision_config
        side = config.image_size // config.patch_size
        window = next(k for k in range(1, side + 1) if side % k == 0 and k * k * keep >= 1)
        return {"name": name, "compressor": build_for(model, family_of(model), builder.builder, window=window).eval()}
    annotations = builder.__init__.__annotations__
    return {"name": name, "keep": keep} if "keep" in annotations else {"name": name}


def _host(size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=size["tower_width"],
        intermediate_size=4 * size["tower_width"],
        num_hidden_layers=size["tower_depth"],
        num_attention_heads=max(1, size["tower_width"] // 64),
        image_size=size["image"],
        patch_size=size["patch"],
    )
    text = LlamaConfig(
        hidden_size=size["width"],
        intermediate_size=8 * size["width"] // 3,
        num_hidden_layers=size["depth"],
        num_attention_heads=max(1, size["width"] // 64),
        vocab_size=1000,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=999, vision_feature_layer=-2)
    )
    count = (size["image"] // size["patch"]) ** 2
    words = torch.randint(1, 900, (1, 60))
    ids = torch.cat([words[:, :20], torch.full((1, count), 999), words[:, 20:]], dim=1)
    pixels = torch.rand(1, 3, size["image"], size["image"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return model.eval().requires_grad_(False), inputs


def _count(model: nn.Module, inputs: Mapping[str, Any], setting: Mapping[str, Any] | None) -> dict[str, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    from vistok.plugins.attach import attach

    def attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch, heads, rows, width = q
        return int(2 * batch * heads * rows * k[2] * (width + v[3]))

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: attention})
    applied: Any = contextlib.nullcontext() if setting is None else attach(model, setting)
    with applied as plugin, torch.inference_mode():
        with counter:
            model(**inputs, use_cache=True, logits_to_keep=1)
        left = None if plugin is None else sum(plugin.trace.image[-1])
    return {"flops": counter.get_total_flops(), "left": left}


def table(costs: Mapping[str, Any] | str | Path | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: everything but the costs is read off the declarations of methods and families.

    Args:
        costs: What `measure` gave, or the JSON file it was stored in.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not hold what `measure` gives.
    """
    if isinstance(costs, (str, Path)):
        costs = _read(Path(costs))
    stored = {} if costs is None else costs["methods"]
    head = ("method", "stages", "does", "attention", "text", "training", "hosts", "towers alone", "FLOPs>", "left>")
    return head, [_table_row(name, stored.get(name, {})) for name in names()]


def _read(path: Path) -> Mapping[str, Any]:
    """Stored costs."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(row.get("flops", 0.0), (int, float)) for row in found["methods"].values()):
            return found
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(f"{path} holds no costs of methods. `vistok bench methods --out {path}` writes such a file.")


def _table_row(name: str, cost: Mapping[str, Any]) -> tuple[str, ...]:
    method: Method = create("method", name)
    stages = [stage for stage in ("vision", "features", "prefill", "decode") if stage in method.stages]
    flops = f"{cost['flops']:.0%}" if "flops" in cost else "-"
    return (
        name,
        ", ".join(stages),
        "merges" if method.merges else "selects",
        _attention(method),
        "yes" if reads_text(method) else "no",
        "yes" if getattr(method, "trained", False) else "no",
        _hosts(method),
        "all" if method.stages == {"vision"} else "none",
        flops,
        str(cost.get("left", "-")),
    )


def _attention(method: Method) -> str:
    """Where a method reads attention or keys."""
    found = []
    if method.needs & {"cls_row", "levels", "attention"}:
        found.append("tower")
    if method.needs & {"keys"}:
        found.append("keys of the tower")
    reads = any(cut.source is not None for cut in method.cuts(DEPTH))
    if reads or (method.evicted_layers(DEPTH) and type(method).window is not Method.window):
        found.append("language model")
    return ", ".join(found) or "no"


def reads_text(method: Method) -> bool:
    """Whether what stays depends on the prompt's words."""
    kind = type(method)
    return "text" in method.needs or kind.rows is not Method.rows or kind.window is not Method.window


def _hosts(method: Method) -> str:
    """Families of vision-language models whose declarations allow the method."""
    builders = {name: registry("family").resolve(name)[1] for name in list_names("family")}
    families = {name: b for name, b in builders.items() if isinstance(b, type) and issubclass(b, Family)}
    if isinstance(method, FeatureMethod) and "image" not in method.modalities:
        return "those with video"
    missing = [name for name, family in families.items() if method.needs & set(family.withheld)]
    return f"all {len(families)}" if not missing else f"all but {', '.join(sorted(set(missing)))}"


def towers() -> list[str]:
    """Kinds of vision transformers that methods of the stage `vision` work in alone."""
    builders = {name: registry("family").resolve(name)[1] for name in list_names("family")}
    return [name for name, b in builders.items() if isinstance(b, type) and issubclass(b, Encoder)]
