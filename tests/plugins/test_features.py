"""Compressing features in front of the language model: prompts become shorter, everything else stays right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.plugins import hosts
from vistok.compress.budget import Budget
from vistok.plugins.attach import attach, plugin_of

NAMES = ["pool", "downsample", "random_features", "mustdrop"]
RAGGED = (1, 3, 0)


@pytest.fixture(scope="module")
def llava() -> Any:
    return hosts.llava()


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_is_the_untouched_model_bit_for_bit(llava, name):
    inputs = hosts.llava_inputs((1, 2))
    plain = hosts.generate(llava, inputs)
    with attach(llava, name, keep=1.0):
        kept = hosts.generate(llava, inputs)
        forward = llava(**inputs).logits
    assert torch.equal(hosts.logits(plain), hosts.logits(kept))
    assert torch.equal(plain.sequences, kept.sequences)
    valid = inputs["attention_mask"].bool()
    assert torch.equal(llava(**inputs).logits[valid], forward[valid])


def by_hand(model: Any, inputs: dict[str, Any], features: torch.Tensor, columns: torch.Tensor, steps: int) -> Any:
    """Generate from a prompt shortened by hand: one sample, one image, `columns` of the image stay."""
    ids = inputs["input_ids"]
    image = torch.where(ids[0] == hosts.IMAGE)[0]
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    keep[image] = False
    keep[image[columns]] = True
    place = torch.where(keep)[0]
    return hosts.generate(
        model,
        {
            "input_ids": ids[:, place],
            "attention_mask": torch.ones(1, len(place), dtype=torch.int64),
            "position_ids": place.unsqueeze(0),
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[features])},
        },
        steps,
    )


def test_pool_equals_average_pooling_by_hand(llava):
    inputs = hosts.llava_inputs((1,), seed=1)
    features = llava.base_model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    pooled = F.avg_pool2d(features.T.view(1, -1, 4, 4), 2).flatten(2)[0].T
    expected = by_hand(llava, inputs, pooled, torch.tensor([5, 7, 13, 15]), 4)
    with attach(llava, "pool", keep=4):
        out = hosts.generate(llava, inputs)
    torch.testing.assert_close(hosts.logits(out), hosts.logits(expected), atol=1e-6, rtol=0)


def test_downsample_equals_a_smaller_picture_by_hand(llava):
    inputs = hosts.llava_inputs((1,), seed=2)
    small = F.interpolate(inputs["pixel_values"], (28, 28), mode="bicubic", antialias=True)
    encoded = llava.base_model.get_image_features(small, interpolate_pos_encoding=True, return_dict=True)
    expected = by_hand(llava, inputs, encoded.pooler_output[0], torch.tensor([5, 7, 13, 15]), 4)
    with attach(llava, "downsample", keep=0.25) as plugin:
        out = hosts.generate(llava, inputs)
        assert plugin.trace.image[0] == [4]
    torch.testing.assert_close(hosts.logits(out), hosts.logits(expected), atol=1e-6, rtol=0)


def test_downsample_runs_the_tower_once_on_the_small_picture(llava):
    seen = []
    hook = llava.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or (kwargs["pixel_values"],))[0].shape[-2:]), with_kwargs=True
    )
    with hook, attach(llava, "downsample", keep=4):
        hosts.generate(llava, hosts.llava_inputs((2,)))
    assert seen == [(28, 28)]


@pytest.mark.parametrize("name", NAMES)
def test_ragged_padded_batch_equals_single_samples(llava, name):
    inputs = hosts.llava_inputs(RAGGED, seed=3)
    with attach(llava, name, keep=0.3):
        batch = hosts.generate(llava, inputs)
        for r, single in enumerate(hosts.split_rows(inputs, RAGGED)):
            alone = hosts.generate(llava, single)
            torch.testing.assert_close(hosts.logits(batch)[r], hosts.logits(alone)[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_callers_prompt_comes_back_in_front(llava, name):
    inputs = hosts.llava_inputs((1, 2))
    with attach(llava, name, keep=4):
        out = hosts.generate(llava, inputs, steps=3)
        plain = llava.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        first = llava.generate(
            inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}, max_length=60
        )
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
    assert torch.equal(plain, out.sequences)
    assert torch.equal(first[:, : length + 3], out.sequences)


@pytest.mark.parametrize("name", NAMES[:3])
def test_positions_of_the_full_prompt_are_kept(llava, name):
    inputs = hosts.llava_inputs((1,))
    with attach(llava, name, keep=4) as plugin:
        positions = plugin.prepare(inputs)["position_ids"]
    assert positions[0, -1] == inputs["input_ids"].shape[1] - 1
    assert positions.shape[1] == inputs["input_ids"].shape[1] - 12


def test_reference_counts_positions_anew(llava):
    inputs = hosts.llava_inputs((1,))
    with attach(llava, "pool", keep=4, reference=True) as plugin:
        assert "position_ids" not in plugin.prepare(inputs)
        renumbered = hosts.logits(hosts.generate(llava, inputs))
    with attach(llava, "pool", keep=4):
        assert (hosts.logits(hosts.generate(llava, inputs)) - renumbered).abs().max() > 1e-3


def test_prepared_inputs_work_on_the_bare_host(llava):
    inputs = hosts.llava_inputs((1, 2))
    with attach(llava, "pool", keep=4) as plugin:
        prepared = plugin.prepare(inputs)
        expected = hosts.logits(hosts.generate(llava, inputs))
    assert torch.equal(hosts.logits(hosts.generate(llava, prepared)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_beams_equal_those_of_a_single_sample(llava, name):
    inputs = hosts.llava_inputs((1, 2), seed=5)
    with attach(llava, name, keep=4) as plugin:
        batch = hosts.generate(llava, inputs, num_beams=3, num_return_sequences=2)
        assert plugin.trace.images == [[16]] * 3 + [[16, 16]] * 3
        for r, single in enumerate(hosts.split_rows(inputs, (1, 2))):
            alone = hosts.generate(llava, single, num_beams=3, num_return_sequences=2)
            assert torch.equal(batch.sequences[2 * r : 2 * r + 2, -4:], alone.sequences[:, -4:])


def test_a_second_turn_goes_on_with_the_callers_ids(llava):
    inputs = hosts.llava_inputs((1,), seed=8)
    with attach(llava, "pool", keep=4) as plugin:
        first = hosts.generate(llava, inputs, steps=3)
        turn = torch.cat([first.sequences, torch.tensor([hosts.words(5, 9)])], dim=1)
        history = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        second = hosts.generate(llava, {**history, "past_key_values": first.past_key_values})
        fresh = hosts.generate(llava, {**history, "pixel_values": inputs["pixel_values"]})
        assert plugin.trace.image[0] == [4]
    assert torch.equal(second.sequences[:, : turn.shape[1]], turn)
    torch.testing.assert_close(hosts.logits(second), hosts.logits(fresh), atol=1e-5, rtol=0)


def test_a_compressed_cache_with_another_prompt_is_refused(llava):
    inputs = hosts.llava_inputs((1,))
    with attach(llava, "pool", keep=4):
        first = hosts.generate(llava, inputs)
        other = {**inputs, "past_key_values": first.past_key_values}
        with pytest.raises(ValueError, match="prompt that pool compressed"):
            hosts.generate(llava, other)


def test_a_loop_by_hand_equals_generate(llava):
    inputs = hosts.llava_inputs((1,), seed=12)
    with attach(llava, "pool", keep=4):
        expected = hosts.generate(llava, inputs)
        out = llava(**inputs)
        seen = [out.logits[:, -1]]
        for _ in range(3):
            token = seen[-1].argmax(-1, keepdim=True)
            out = llava(input_ids=token, past_key_values=out.past_key_values)
            seen.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(seen, 1), hosts.logits(expected), atol=1e-5, rtol=0)


def test_labels_are_shortened_with_the_prompt(llava):
    inputs = hosts.llava_inputs((1, 2), seed=4)
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == hosts.IMAGE) | (inputs["attention_mask"] == 0), -100)
    with attach(llava, "random_features", keep=1.0):
        full = llava(**inputs, labels=labels).loss
        assert torch.equal(full, llava(**inputs, labels=labels).loss)
    with attach(llava, "pool", keep=4):
        out = llava(**inputs, labels=labels)
    assert out.loss.isfinite() and out.logits.shape[1] < ids.shape[1]


def test_the_trace_speaks_of_the_callers_prompt(llava):
    inputs = hosts.llava_inputs((1, 2))
    with attach(llava, "pool", keep=Budget(count=4)) as plugin:
        out = hosts.generate(llava, inputs, steps=3)
        trace, report = plugin.trace, plugin.report()
    assert trace.prompt == inputs["attention_mask"].sum(1).tolist()
    assert trace.images == [[16], [16, 16]]
    assert trace.image == [[4, 8]] * 6
    assert all((inputs["input_ids"][b, k] == hosts.IMAGE).all() for b, k in enumerate(trace.kept))
    both = [c + f for c, f in zip(trace.cached[0], trace.filler[0])]
    assert both == [out.past_key_values.get_seq_length()] * 2
    assert report.budget["count"] == [4, 8] and sum(report.flops) < sum(report.flops_without)


def test_detaching_restores_forward_and_generate(llava):
    names = set(vars(llava))
    with attach(llava, "pool"):
        assert {"forward", "generate"} <= set(vars(llava))
    assert set(vars(llava)) == names


def test_a_copy_of_the_model_compresses_with_its_own_weights(llava):
    inputs = hosts.llava_inputs((1,))
    with attach(llava, "pool", keep=4):
        expected = hosts.logits(hosts.generate(llava, inputs))
        twin = copy.deepcopy(llava)
    assert torch.equal(hosts.logits(hosts.generate(twin, inputs)), expected)
    twin.lm_head.weight.zero_()
    assert hosts.logits(hosts.generate(twin, inputs)).abs().max() == 0
    plugin_of(twin).detach()
    assert "forward" not in vars(twin)


@pytest.mark.parametrize("threshold", [-1.0, 0.05])
def test_merging_in_the_tower_decides_per_picture(llava, threshold):
    inputs = hosts.llava_inputs(RAGGED, seed=3)
    config = {"similarity": threshold, "keep": 6, "keys": 0.2}
    with attach(llava, "mustdrop", **config) as plugin:
        batch = hosts.generate(llava, inputs)
        entered = plugin.trace.image[0]
        assert plugin.trace.images == [[16], [16, 16, 16], []]
        assert threshold > 0 or entered == [8, 24, 0]
        for r, single in enumerate(hosts.split_rows(inputs, RAGGED)):
            alone = hosts.generate(llava, single)
            torch.testing.assert_close(hosts.logits(batch)[r], hosts.logits(alone)[0], atol=2e-5, rtol=0)


def test_the_key_set_survives_any_threshold(llava):
    inputs = hosts.llava_inputs((1, 2), seed=6)
    drop_all = {"gamma_global": 10.0, "gamma_individual": 10.0}
    with attach(llava, "mustdrop", similarity=2.0, keys=0.2, **drop_all) as plugin:
        hosts.generate(llava, inputs)
        assert plugin.trace.image[-1] == [4, 8]  # ceil(0.2 * 16) of each picture
        assert plugin.trace.cached[1][0] < plugin.trace.cached[0][0]


def test_the_released_order_puts_merged_tokens_first(llava):
    inputs = hosts.llava_inputs((2,), seed=6)
    with attach(llava, "mustdrop", similarity=-1.0, reference=True) as plugin:
        assert "position_ids" not in plugin.prepare(inputs)
        hosts.generate(llava, inputs)
        assert plugin.trace.image[0] == [16]


def test_a_prefill_method_has_nothing_to_prepare(llava):
    with attach(llava, "fastv") as plugin, pytest.raises(ValueError, match="nothing to prepare"):
        plugin.prepare(hosts.llava_inputs((1,)))
