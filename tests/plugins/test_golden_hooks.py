"""The whole plug-in against outputs made without removing a token, and FastV against its official fork."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.plugins import decoder
from vistok.plugins.attach import attach

pytestmark = pytest.mark.parity


def hooked_llava(meta: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    v, t = meta["config"]["vision"], meta["config"]["text"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=v["hidden"],
            intermediate_size=v["mlp"],
            num_hidden_layers=v["layers"],
            num_attention_heads=v["heads"],
            image_size=v["image"],
            patch_size=v["patch"],
        ),
        text_config=LlamaConfig(
            hidden_size=t["hidden"],
            intermediate_size=t["mlp"],
            num_hidden_layers=t["layers"],
            num_attention_heads=t["heads"],
            num_key_value_heads=t["kv_heads"],
            vocab_size=t["vocab"],
            rms_norm_eps=t["rms_norm_eps"],
            rope_theta=t["rope_theta"],
        ),
        image_token_index=meta["config"]["image_token"],
        vision_feature_layer=meta["config"]["vision_feature_layer"],
        vision_feature_select_strategy=meta["config"]["select"],
    )
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    state = model.state_dict()
    filled = {k: w for k, w in decoder.weights(meta["state_dict"]).items() if state[k].is_floating_point()}
    model.load_state_dict(filled, strict=False)
    return model


def test_pruned_generation_matches_the_masked_reference(golden):
    ref = golden("vlm_hooks")
    model = hooked_llava(ref.meta)
    pixels = np.random.default_rng(801).standard_normal((3, 3, 84, 84)).astype(np.float32)
    inputs = {
        "input_ids": ref["input_ids"],
        "attention_mask": ref["attention_mask"],
        "pixel_values": torch.from_numpy(pixels),
    }
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def run() -> Any:
        return model.generate(**inputs, **options, eos_token_id=None, pad_token_id=0)

    plain = run()
    torch.testing.assert_close(torch.stack(plain.logits, 1), ref["logits_unpruned"], atol=2e-5, rtol=0)
    with attach(model, "fastv", layers=[2], ratios=[0.5], reference=True) as plugin:
        notes = decoder.record(plugin)
        out = run()
        kept = plugin.trace.kept
    torch.testing.assert_close(torch.stack(out.logits, 1), ref["logits_pruned"], atol=2e-5, rtol=0)
    image = inputs["input_ids"] == ref.meta["config"]["image_token"]
    torch.testing.assert_close(notes[0]["scores"], ref["scores"][image], atol=1e-6, rtol=0)
    assert decoder.lengths(out) == ref["kv_len"].tolist()
    assert torch.equal(out.sequences[:, -4:], ref["tokens_pruned"])
    assert all(torch.equal(k, torch.where(row)[0]) for k, row in zip(kept, ref["kept_mask"] & image))


def test_fastv_matches_its_fork_at_prefill_and_decoding(golden):
    ref = golden("fastv_scores")
    layout = ref.meta["input"]["layout"]
    model = decoder.host(ref.meta["model"], ref.meta["state_dict"])
    with attach(model, "fastv", layers=[2], ratios=[0.5]) as plugin:
        notes = decoder.record(plugin)
        out = decoder.prefill(model, decoder.prompt(601, layout, 64), layout, use_cache=True)
        assert decoder.lengths(out) == ref["kv_len"].tolist()
        steps = decoder.decode(model, out, 602, 2, sum(layout))
        uncached = decoder.prefill(model, decoder.prompt(601, layout, 64), layout, use_cache=False)
    torch.testing.assert_close(notes[0]["scores"], ref["image_scores"], atol=1e-6, rtol=0)
    assert torch.equal(notes[0]["kept"], ref["kept"])
    torch.testing.assert_close(out.last_hidden_state[0, -4:], ref["last_hidden"], atol=2e-4, rtol=0)
    torch.testing.assert_close(out.last_hidden_state[0].mean(-1), ref["row_mean"], atol=2e-4, rtol=0)
    torch.testing.assert_close(steps, ref["decode_hidden"], atol=2e-4, rtol=0)
    torch.testing.assert_close(uncached.last_hidden_state[0, -1], ref["last_hidden_nocache"], atol=2e-4, rtol=0)
