"""SEED's own tokenizer checkpoints (AILab-CVC/SEED, `seed_quantizer.pt`), its preset, and BLIP-2, where it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok.hub import LoadError, load_strictly
from vistok.registry import Weights, preset
from vistok.tokenizers.official import FORMATS, Converted, Format, Rules, rename
from vistok.tokenizers.seed import SEED
from vistok.unpickle import UnreadableError, read_tensors

RULES: Rules = (
    (r"^visual_encoder\.", "vision."),
    (r"^ln_vision\.", "norm_vision."),
    (r"^query_tokens$", "queries"),
    (r"^reverse_tokens$", "head.query"),
    (r"^Reverse_Qformer\.bert\.", "head.qformer."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"qformer\.embeddings\.LayerNorm\.", "qformer.norm."),
    (r"qformer\.encoder\.layer\.", "qformer.layers."),
    (r"\.attention\.(?:self|output)\.", ".attn."),
    (r"\.crossattention\.(?:self|output)\.", ".cross."),
    (r"\.(attn|cross)\.dense\.", r".\1.proj."),
    (r"\.(attn|cross)\.LayerNorm\.", r".\1.norm."),
    (r"\.intermediate_query\.dense\.", ".fc1."),
    (r"\.output_query\.dense\.", ".fc2."),
    (r"\.output_query\.LayerNorm\.", ".norm."),
    (r"^encode_task_layer\.", "to_code."),
    (r"^decode_task_layer\.", "from_code."),
    (r"^quantize\.", "quantizer."),
    (r"^pos_embed$", "rebuild.position"),
    (r"^pos_embed_image$", "detokenize.position"),
    (r"^blocks\.", "rebuild.transformer.blocks."),
    (r"^blocks_image\.", "detokenize.transformer.blocks."),
    (r"^image_down\.", "head.down."),
    (r"^distill_image_proj\.", "head.proj."),
)
TEXT_RULES: Rules = (
    (r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\.", r"text_branch.\1s."),
    (r"^Qformer\.bert\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"text_branch.layers.\1.fc1."),
    (r"^Qformer\.bert\.encoder\.layer\.(\d+)\.output\.dense\.", r"text_branch.layers.\1.fc2."),
    (r"^Qformer\.bert\.encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"text_branch.layers.\1.norm."),
    (r"^text_proj\.", "text_branch.proj."),
    (r"^vision_proj\.", "text_branch.picture_proj."),
    (r"^temp$", "text_branch.temperature"),
)
"""Names of the text branch, in checkpoints of BLIP-2's and SEED's first stages."""
UNUSED = ("embeddings.position_ids", "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")


def recognises(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """A Q-Former beside a codebook and a task layer, with or without a configuration."""
    return {"query_tokens", "ln_vision.weight", "encode_task_layer.0.weight", "quantize.embedding.weight"} <= set(
        tensors
    )


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Configuration and keys; sizes and the kind of de-tokenizer come from the tensors.

    Numbers of heads are not in tensors: those of a configuration (`vis_heads`, `heads`), else heads of 88 in the tower
    and 64 in the Q-Former as published. Unused text embeddings are dropped.

    Raises:
        LoadError: No configuration, and widths that are no multiple of the published heads.
    """
    width, hidden = tensors["visual_encoder.patch_embed.proj.weight"].shape[0], tensors["query_tokens"].shape[-1]
    size, dim = tensors["quantize.embedding.weight"].shape
    patch = tensors["visual_encoder.patch_embed.proj.weight"].shape[-1]
    side = round((tensors["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    ours = {
        "image_size": side * patch,
        "num_tokens": tensors["query_tokens"].shape[1],
        "vision": {
            "width": width,
            "depth": _depth(tensors, "visual_encoder.blocks."),
            "heads": _heads(config, "vis_heads", width, 88),
            "hidden": tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            "patch_size": patch,
        },
        "qformer": {
            "width": hidden,
            "depth": _depth(tensors, "Qformer.bert.encoder.layer."),
            "heads": _heads(config, "heads", hidden, 64),
        },
        "decoder_depth": _depth(tensors, "blocks_image."),
        "embedding_dim": tensors["distill_image_proj.weight"].shape[0],
        "detokenizer": "mlp" if "image_down.0.weight" in tensors else "qformer",
        "quantizer": {"name": "vq", "codebook_size": size, "dim": dim},
    }
    kept = {k: v for k, v in tensors.items() if not k.endswith(UNUSED)}
    flat = ("query_tokens", "pos_embed", "pos_embed_image", "reverse_tokens")
    return "seed", ours, rename({k: v[0] if k in flat else v for k, v in kept.items()}, RULES)


def start_from_blip_2(model: SEED, files: Sequence[str | Path]) -> None:
    """Put weights of a first stage of BLIP-2, as LAVIS saves them, into a SEED with a text branch.

    Stage I of SEED starts from `blip2_pretrained.pth`, which has no vision tower, and `eva_vit_g.pth`, which is one.
    The heads for matching and captioning are dropped, and what a tower has beyond the blocks in use; everything else
    has to fit. Checkpoints of SEED's own stage I have the same names. Parts of stage II keep what they hold.

    Args:
        model: A SEED with a text branch of BLIP-2's sizes.
        files: Weight files that hold all of it together.

    Raises:
        LoadError: A file that cannot be read, or weights that do not fit.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors = read_tensors(file)
        except (UnreadableError, OSError) as err:
            raise LoadError(f"train.step.blip_2: {file} cannot be read: {err}") from err
        prefix = "visual_encoder." if "patch_embed.proj.weight" in tensors else ""
        found |= {f"{prefix}{k}": v for k, v in tensors.items()}
    heads = ("Qformer.cls.", "itm_head.")
    kept = {k: v for k, v in found.items() if not (k.startswith(heads) or k.endswith(".position_ids"))}
    named = rename(kept, (*TEXT_RULES, *RULES))
    own = model.state_dict()
    for key, shape in (("queries", (-1, own["queries"].shape[-1])), ("text_branch.temperature", (1,))):
        if key in named:
            named[key] = named[key].reshape(shape)
    later = {k: v for k, v in own.items() if k.split(".")[0] in model.second_stage}
    fitting = {k: v for k, v in named.items() if k in own or not k.startswith("vision.")}
    load_strictly(model, later | fitting, ", ".join(str(file) for file in files))


def _heads(config: Mapping[str, Any], key: str, width: int, published: int) -> int:
    if key in config:
        return int(config[key])
    if width % published:
        raise LoadError(
            f"A width of {width} is no multiple of the published head of {published} channels. Put {key!r}, the number "
            "of heads, into a config.json beside the weights."
        )
    return width // published


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)})


FORMATS.append(Format("SEED (AILab-CVC/SEED)", recognises, convert))
preset(
    "tokenizer",
    "seed_2.ailab_cvc",
    builder="seed",
    config={
        "quantizer": {"name": "vq", "codebook_size": 8192, "dim": 32},
        "pipeline": "stabilityai/stable-diffusion-2-1-unclip",
    },
    weights=Weights(
        hub="AILab-CVC/seed-tokenizer-2",
        filename="seed_quantizer.pt",
        licence_code="Apache-2.0 with an added clause: academic, non-commercial research only",
        licence_weights="as the code; the unCLIP decoder is under OpenRAIL",
        trained_on="CC3M, Unsplash, COCO (SEED-1; not stated for SEED-2)",
        source="no rFID, PSNR or LPIPS was published",
    ),
)
