"""A tiny LLaVA in a directory of its own, with a processor made of nothing but words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistok.data.scenes import NUMBERS, Scenes

SIZE = 56
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}<image> "
    "{% else %}{{ part.text }} {% endif %}{% endfor %}<end> {% endfor %}"
)


def words() -> list[str]:
    """Every word that scenes use."""
    scenes = Scenes(count=200, size=SIZE, things="all")
    found = {word for i in range(200) for q in scenes.scene(i).questions for word in q.text.replace("?", " ?").split()}
    names = {name for things in scenes.table.values() for name in things}
    return sorted(found | names | {"yes", "no", *NUMBERS})


def processor() -> Any:
    """A LLaVA processor: words as tokens, pictures of 56 pixels, 16 placeholders each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BitImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    table = {word: i for i, word in enumerate(["<pad>", "<unk>", "<end>", "<image>", *words()])}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["<image>"], padding_side="left", **special
    )
    images = BitImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def save(folder: Path) -> Path:
    """Write model and processor; `AutoModelForImageTextToText` and `AutoProcessor` read them."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    made = processor()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(made.tokenizer),
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    image = made.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, image_seq_length=16)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
