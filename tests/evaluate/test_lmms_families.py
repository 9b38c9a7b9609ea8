"""The adapter for lmms-eval on every family: transformers' processors, batches of prompts with 1, 2 and 0 pictures."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from tests.plugins import hosts, zoo
from vistok.evaluate import lmms
from vistok.plugins.attach import attach

SIDE = {"height": 56, "width": 56}
START, END, FAKE, GLOBAL = zoo.START, zoo.END, 58, 57


def tokenizer(names: dict[str, int], **special: Any) -> Any:
    """Words `w1` ... and special tokens, one id each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    taken = set(names.values())
    words = {f"w{i}": i for i in range(1, hosts.VOCAB) if i not in taken} | {"<pad>": 0} | names
    made = Tokenizer(models.WordLevel(words, unk_token="w50"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="w50", additional_special_tokens=list(names), **special
    )


def template(image: str) -> str:
    """Chats as words, a picture as `image`."""
    part = "{% if p.type == 'image' %}" + image + " {% else %}{{ p.text }} {% endif %}"
    return "w1 {% for m in messages %}{% for p in m.content %}" + part + "{% endfor %}{% endfor %}w2 "


def processor(family: str) -> Any:
    """The family's processor for the tiny host of the zoo."""
    import transformers as hf

    if family == "llava_next":
        return hf.LlavaNextProcessor(
            hf.LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=SIDE, image_grid_pinpoints=zoo.ANYRES),
            tokenizer({"<image>": hosts.IMAGE}),
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template("<image>"),
        )
    if family == "llava_onevision":
        return hf.LlavaOnevisionProcessor(
            hf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=zoo.ANYRES),
            tokenizer({"<image>": hosts.IMAGE, "<video>": zoo.VIDEO}),
            hf.LlavaOnevisionVideoProcessor(size=SIDE),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            chat_template=template("<image>"),
        )
    if family.startswith("qwen"):
        names = {"<|image_pad|>": hosts.IMAGE, "<|video_pad|>": zoo.VIDEO}
        names |= {"<|vision_start|>": START, "<|vision_end|>": END}
        kind, size = ("Qwen3VL" if "qwen3" in family else "Qwen2VL"), {"shortest_edge": 28**2, "longest_edge": 56**2}
        full = "Qwen2_5_VLProcessor" if "2_5" in family else f"{kind}Processor"
        return getattr(hf, full)(
            hf.Qwen2VLImageProcessor(size=size, patch_size=14, merge_size=2, temporal_patch_size=2),
            tokenizer(names),
            getattr(hf, f"{kind}VideoProcessor")(patch_size=14, merge_size=2, temporal_patch_size=2),
            chat_template=template("<|vision_start|> <|image_pad|> <|vision_end|>"),
        )
    if family == "internvl":
        names = {"<IMG_CONTEXT>": hosts.IMAGE, "<img>": START, "</img>": END, "<video>": zoo.VIDEO}
        roles = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
        words = tokenizer(names, extra_special_tokens=roles | {"context_image_token": "<IMG_CONTEXT>"})
        return hf.InternVLProcessor(
            hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=3),
            words,
            hf.InternVLVideoProcessor(size=SIDE),
            image_seq_length=4,
            chat_template=template("<IMG_CONTEXT>"),
        )
    rows = {f"<row_{r}_col_{c}>": 49 + 2 * (r - 1) + c for r in (1, 2) for c in (1, 2)}
    names = {
        "<image>": hosts.IMAGE,
        "<fake_token_around_image>": FAKE,
        "<global-img>": GLOBAL,
        "<end_of_utterance>": END,
    }
    smol = family == "smolvlm"
    made = hf.SmolVLMImageProcessor if smol else hf.Idefics3ImageProcessor
    return (hf.SmolVLMProcessor if smol else hf.Idefics3Processor)(
        made(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer(names | rows),
        **({"video_processor": hf.SmolVLMVideoProcessor()} if smol else {}),
        image_seq_len=4,
        chat_template=template("<image>"),
    )


def chats() -> list[lmms.Chat]:
    """Prompts with one picture, two and none."""
    found = []
    for number, text in ((1, "w5 w6 w7"), (2, "w8 w9"), (0, "w10 w11 w12 w13")):
        noise = [hosts.picture(48, 80 - 40 * k, 3, seed=7 * number + k).mul(60).add(128) for k in range(number)]
        pictures = [lmms.shown(Image.fromarray(n.clamp(0, 255).byte().numpy())) for n in noise]
        found.append([{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fastv", "pool", "snapkv"])
@pytest.mark.parametrize("family", zoo.HOSTS)
def test_batches_are_single_prompts_on_every_family(family, method, tmp_path):
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="transformers' SmolVLM processor needs num2words")
    host = zoo.HOSTS[family]().model
    host.get_output_embeddings().weight[[0, *range(49, hosts.VOCAB)]] = 0  # what only prompts hold is never said
    host.save_pretrained(tmp_path)
    processor(family).save_pretrained(tmp_path)
    adapter = lmms.Simple(str(tmp_path), method=method, keep=0.5, device="cpu", batch_size=3)
    said = adapter._answers(chats(), {"max_new_tokens": 4})
    losses = adapter._losses(chats(), ["w20", "w21 w22 w23", "w24 w25"])
    singles = [adapter._losses([chat], [text])[0][0] for chat, text in zip(chats(), ("w20", "w21 w22 w23", "w24 w25"))]
    assert [loss for loss, _ in losses] == pytest.approx(singles, abs=2e-5)
    assert all(greedy for _, greedy in adapter._losses(chats(), [text for text, _ in said]))
    adapter.plugin.detach()
    with attach(adapter.model, method, keep=0.5) as plugin:
        for chat, (text, _) in zip(chats(), said):
            prompt = adapter.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            images = [part["image"] for part in chat[0]["content"] if part["type"] == "image"]
            inputs = adapter.processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
            out = adapter.model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
            new = out[0, inputs["input_ids"].shape[1] :]
            assert adapter.tokenizer.decode(new, skip_special_tokens=True) == text
            if images and method != "snapkv":
                assert plugin.trace.image[-1][0] < sum(plugin.trace.images[0])
