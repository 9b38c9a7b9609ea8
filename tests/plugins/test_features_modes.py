"""Prompts shortened before the language model, in every mode of `generate()` and in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.plugins import hosts
from vistok.plugins.attach import attach

NAMES = ["pool", "downsample", "random_features", "mustdrop", "divprune"]


@pytest.fixture(scope="module")
def llava() -> Any:
    return hosts.llava()


@pytest.fixture(scope="module")
def eager() -> Any:
    return hosts.llava("eager")


@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup_decoding_gives_the_greedy_tokens(llava, name):
    inputs = hosts.llava_inputs((1,), seed=7)
    with attach(llava, name, keep=4):
        plain = hosts.generate(llava, inputs, steps=10)
        looked_up = hosts.generate(llava, inputs, steps=10, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, looked_up.sequences)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mustdrop"])  # it thins out the cache as well
def test_static_cache_equals_dynamic_cache(llava, name):
    inputs = hosts.llava_inputs((1, 2), seed=10)
    with attach(llava, name, keep=4):
        dynamic = hosts.generate(llava, inputs)
        static = hosts.generate(llava, inputs, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(hosts.logits(dynamic), hosts.logits(static), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mustdrop"])
def test_without_a_cache_every_step_is_the_same(llava, name):
    inputs = hosts.llava_inputs((1, 2), seed=11)
    with attach(llava, name, keep=4):
        cached = hosts.generate(llava, inputs)
        uncached = hosts.generate(llava, inputs, use_cache=False)
    torch.testing.assert_close(hosts.logits(cached), hosts.logits(uncached), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_sdpa_and_eager_keep_the_same_tokens(llava, eager, name):
    inputs = hosts.llava_inputs((1, 3, 0), seed=4)
    found = []
    for model in (llava, eager):
        with attach(model, name, keep=4) as plugin:
            found.append((hosts.logits(hosts.generate(model, inputs)), plugin.trace.kept))
    torch.testing.assert_close(found[0][0], found[1][0], atol=4e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_sampled_sequence_has_the_logits_of_one_full_pass(llava, name):
    inputs = hosts.llava_inputs((1,), seed=6)
    with attach(llava, name, keep=4) as plugin:
        out = hosts.generate(llava, inputs, do_sample=True, num_return_sequences=3)
        short = plugin.prepare(inputs)
    new = out.sequences[:, -4:]
    for row, tokens in enumerate(new):
        ids = torch.cat([short["input_ids"], tokens[None, :-1]], dim=1)
        steps = short["position_ids"].amax() + 1 + torch.arange(3)
        positions = torch.cat([short["position_ids"], steps[None]], dim=1)
        whole = llava(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            mm_encoder_outputs=short["mm_encoder_outputs"],
        ).logits
        seen = hosts.logits(out)[row]
        torch.testing.assert_close(seen, whole[0, -4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mustdrop"])
def test_a_second_turn_on_the_same_cache_equals_a_fresh_start(llava, name):
    inputs = hosts.llava_inputs((1,), seed=8)
    with attach(llava, name, keep=4):
        first = hosts.generate(llava, inputs, steps=3)
        turn = torch.cat([first.sequences, torch.tensor([hosts.words(5, 9)])], dim=1)
        history = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        second = hosts.generate(llava, {**history, "past_key_values": first.past_key_values})
        fresh = hosts.generate(llava, {**history, "pixel_values": inputs["pixel_values"]})
    torch.testing.assert_close(hosts.logits(second), hosts.logits(fresh), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES[:3])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name):
    model = hosts.llava()
    inputs = hosts.llava_inputs((1, 2))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == hosts.IMAGE, -100)
    weight = model.model.multi_modal_projector.linear_1.weight.requires_grad_(True)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable()
        weight.grad = None
        with attach(model, name, keep=4):
            loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["pool", "downsample"])
def test_an_exception_inside_leaves_nothing_behind(llava, name):
    names = set(vars(llava))
    inputs = hosts.llava_inputs((1,))
    plain = hosts.logits(hosts.generate(llava, inputs))
    wrong = {**inputs, "input_ids": inputs["input_ids"][:, :-12]}
    wrong["attention_mask"] = torch.ones_like(wrong["input_ids"])
    with pytest.raises(ValueError, match="placeholders"), attach(llava, name, keep=4):
        hosts.generate(llava, wrong)
    assert set(vars(llava)) == names
    assert torch.equal(hosts.logits(hosts.generate(llava, inputs)), plain)


@pytest.mark.parametrize("name", ["pool", "downsample"])
def test_pausing_leaves_new_prompts_alone_and_old_caches_right(llava, name):
    inputs = hosts.llava_inputs((1,), seed=3)
    plain = hosts.logits(hosts.generate(llava, inputs))
    with attach(llava, name, keep=4) as plugin:
        first = llava(**inputs)
        token = first.logits[:, -1:].argmax(-1)
        expected = llava(input_ids=token, past_key_values=copy.deepcopy(first.past_key_values)).logits
        with plugin.pause():
            assert torch.equal(hosts.logits(hosts.generate(llava, inputs)), plain)
            paused = llava(input_ids=token, past_key_values=first.past_key_values).logits
        assert not torch.equal(hosts.logits(hosts.generate(llava, inputs)), plain)
    torch.testing.assert_close(paused, expected, atol=1e-6, rtol=0)
