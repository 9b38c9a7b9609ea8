"""Dropping image tokens inside the language model: every invariant of the runtime, on a tiny LLaVA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.plugins import hosts
from vistok.plugins.attach import attach, plugin_of

METHODS: dict[str, dict[str, Any]] = {
    "random": {"seed": 3},
    "fastv": {},
    "pyramiddrop": {},
    "transprune": {},
    "sparsevlm": {},
    "sparsevlm_plus": {},
    "pyramiddrop, renumbered": {"reference": True},
    "transprune, transitions": {"score": "ttv"},
    "transprune, attention": {"score": "iga"},
    "sparsevlm, dropping": {"recycle": False},
    "mustdrop": {"merge": False},
    "mustdrop, by thresholds": {"merge": False, "gamma_global": 0.06, "gamma_individual": 0.08, "keep": None},
    "snapkv": {"window": 4},
    "h2o": {},
    "h2o, normalised": {"normalise": True},
    "snapkv, own heads": {"window": 4, "heads": "own"},
    "sparsevlm, by rank": {"recycle": False, "rule": "rank", "scale": 1.0, "keep": None},
}
NAMES = list(METHODS)
FREE = ("sparsevlm, by rank", "mustdrop, by thresholds")  # what stays is not given by `keep`
EVICTING = [n for n in NAMES if n.startswith(("mustdrop", "snapkv", "h2o"))]
MASKABLE = [n for n in NAMES if n not in ("sparsevlm", "pyramiddrop, renumbered", "snapkv, own heads")]
RAGGED = (1, 3, 0)


@pytest.fixture(scope="module")
def llava() -> Any:
    return hosts.llava()


@pytest.fixture(scope="module")
def eager() -> Any:
    return hosts.llava("eager")


def put(model: Any, name: str, **config: Any) -> Any:
    """Attach one row of the table."""
    return attach(model, name.split(",")[0], **{**config, **METHODS[name]})


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FREE])
def test_keeping_all_is_the_untouched_model_bit_for_bit(llava, name):
    inputs = hosts.llava_inputs((1, 2))
    plain = hosts.generate(llava, inputs)
    with put(llava, name, keep=1.0) as plugin:
        kept = hosts.generate(llava, inputs)
        assert plugin.trace.image[-1] == [16, 32]
    assert torch.equal(hosts.logits(plain), hosts.logits(kept))
    assert torch.equal(plain.sequences, kept.sequences)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKABLE)
def test_removing_equals_masking(llava, eager, name, attn):
    model = copy.deepcopy(llava if attn == "sdpa" else eager).double()
    images, inputs = (1, 2), hosts.llava_inputs((1, 2), seed=1)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    # eager masks are minus infinity in float64: a padding row would be NaN, with or without us
    for given in [inputs] if attn == "sdpa" else hosts.split_rows(inputs, images):
        with put(model, name, keep=0.25) as plugin:
            out = hosts.generate(model, given)
            call = plugin.runtime.last
            assert sum(plugin.trace.cached[-1]) < sum(plugin.trace.cached[0])
        tokens = out.sequences[:, given["input_ids"].shape[1] :]
        expected = hosts.emulate(model, given, call, tokens)
        torch.testing.assert_close(hosts.logits(out), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FREE])
def test_dropping_changes_the_output(llava, name):
    inputs = hosts.llava_inputs((1,))
    plain = hosts.logits(hosts.generate(llava, inputs))
    with put(llava, name, keep=2):
        assert (hosts.logits(hosts.generate(llava, inputs)) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_ragged_padded_batch_equals_single_samples(llava, name):
    inputs = hosts.llava_inputs(RAGGED, seed=2)
    with put(llava, name, keep=0.25) as plugin:
        batch = hosts.generate(llava, inputs)
        images = plugin.trace.image
        for r, single in enumerate(hosts.split_rows(inputs, RAGGED)):
            alone = hosts.generate(llava, single)
            torch.testing.assert_close(hosts.logits(batch)[r], hosts.logits(alone)[0], atol=2e-5, rtol=0)
            if RAGGED[r]:
                assert [row[r] for row in images] == [row[0] for row in plugin.trace.image]


@pytest.mark.parametrize("name", NAMES)
def test_sdpa_and_eager_keep_the_same_tokens(llava, eager, name):
    inputs = hosts.llava_inputs((2, 1), seed=4)
    kept = []
    for model in (llava, eager):
        with put(model, name, keep=0.3) as plugin:
            hosts.generate(model, inputs, steps=1)
            kept.append(plugin.trace.kept)
    assert all(torch.equal(a, b) for a, b in zip(*kept))


def test_every_image_keeps_its_share(llava):
    with attach(llava, "fastv", keep=5) as plugin:
        hosts.generate(llava, hosts.llava_inputs((3, 1)), steps=1)
        assert plugin.trace.image[-1] == [15, 5]
        assert plugin.runtime.last.columns_at(5).counts == [[5, 5, 5], [5]]


def test_cached_tokens_and_fillers_make_up_the_cache(llava):
    with attach(llava, "fastv", keep=4) as plugin:
        out = hosts.generate(llava, hosts.llava_inputs((1, 3)), steps=3)
        trace = plugin.trace
    for layer, cache in enumerate(out.past_key_values.layers):
        both = [c + f for c, f in zip(trace.cached[layer], trace.filler[layer])]
        assert both == [cache.get_seq_length()] * 2
    assert trace.steps == 2


@pytest.mark.parametrize("name", NAMES)
def test_beams_equal_those_of_a_single_sample(llava, name):
    inputs = hosts.llava_inputs((1, 2), seed=5)
    with put(llava, name, keep=0.25):
        batch = hosts.generate(llava, inputs, num_beams=3, num_return_sequences=2)
        for r, single in enumerate(hosts.split_rows(inputs, (1, 2))):
            alone = hosts.generate(llava, single, num_beams=3, num_return_sequences=2)
            assert torch.equal(batch.sequences[2 * r : 2 * r + 2, -4:], alone.sequences[:, -4:])


def test_sampled_sequences_follow_the_masked_model(llava):
    inputs = hosts.llava_inputs((1,), seed=6)
    with attach(llava, "fastv", keep=0.25) as plugin:
        out = hosts.generate(llava, inputs, do_sample=True, num_return_sequences=3)
        call = plugin.runtime.last
    repeated = {k: v.repeat_interleave(3, 0) for k, v in inputs.items()}
    expected = hosts.emulate(llava, repeated, call, out.sequences[:, -4:])
    torch.testing.assert_close(hosts.logits(out), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "pyramiddrop, renumbered", "mustdrop", "snapkv"])
def test_prompt_lookup_decoding_gives_the_greedy_tokens(llava, name):
    inputs = hosts.llava_inputs((1,), seed=7)
    with put(llava, name, keep=0.25):
        plain = hosts.generate(llava, inputs, steps=12)
        looked_up = hosts.generate(llava, inputs, steps=12, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, looked_up.sequences)


@pytest.mark.parametrize("name", MASKABLE)
def test_a_second_turn_on_the_same_cache_equals_one_masked_pass(llava, name):
    inputs = hosts.llava_inputs((1,), seed=8)
    with put(llava, name, keep=0.25) as plugin:
        first = hosts.generate(llava, inputs, steps=3)
        call = plugin.runtime.last
        turn = torch.cat([first.sequences, torch.tensor([hosts.words(5, 9)])], dim=1)
        second = hosts.generate(
            llava,
            {"input_ids": turn, "attention_mask": torch.ones_like(turn), "past_key_values": first.past_key_values},
        )
        assert plugin.runtime.last is call
    tokens = second.sequences[:, inputs["input_ids"].shape[1] :]
    expected = hosts.emulate(llava, inputs, call, tokens)[:, -4:]
    torch.testing.assert_close(hosts.logits(second), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in EVICTING])
def test_static_cache_equals_dynamic_cache(llava, name):
    inputs = hosts.llava_inputs((1, 2), seed=10)
    with put(llava, name, keep=0.25):
        dynamic = hosts.generate(llava, inputs)
        static = hosts.generate(llava, inputs, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(hosts.logits(dynamic), hosts.logits(static), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EVICTING)
def test_a_static_cache_cannot_be_thinned_out(llava, name):
    inputs = hosts.llava_inputs((1,))
    with put(llava, name, keep=0.25), pytest.raises(ValueError, match="evicts cache entries"):
        hosts.generate(llava, inputs, cache_implementation="static")


@pytest.mark.parametrize("name", NAMES)
def test_without_a_cache_the_first_step_is_the_same(llava, name):
    inputs = hosts.llava_inputs((1, 2), seed=11)
    with put(llava, name, keep=0.25) as plugin:
        cached = hosts.generate(llava, inputs)
        uncached = hosts.generate(llava, inputs, use_cache=False)
        assert plugin.trace.cached == []
    torch.testing.assert_close(hosts.logits(cached)[:, 0], hosts.logits(uncached)[:, 0], atol=1e-5, rtol=0)


def test_random_without_a_cache_equals_random_with_a_cache(llava):
    inputs = hosts.llava_inputs((1, 2), seed=11)
    with attach(llava, "random", keep=0.25):
        cached = hosts.generate(llava, inputs)
        uncached = hosts.generate(llava, inputs, use_cache=False)
    torch.testing.assert_close(hosts.logits(cached), hosts.logits(uncached), atol=1e-5, rtol=0)


def test_a_loop_by_hand_equals_generate(llava):
    inputs = hosts.llava_inputs((1,), seed=12)
    with attach(llava, "fastv", keep=0.25):
        expected = hosts.generate(llava, inputs)
        out = llava(**inputs)
        seen = [out.logits[:, -1]]
        for _ in range(3):
            token = seen[-1].argmax(-1, keepdim=True)
            out = llava(input_ids=token, past_key_values=out.past_key_values)
            seen.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(seen, 1), hosts.logits(expected), atol=1e-5, rtol=0)


def test_embeddings_as_input_equal_ids_as_input(llava):
    inputs = hosts.llava_inputs((1,), seed=13)
    embeds = llava.get_input_embeddings()(inputs["input_ids"])
    with attach(llava, "fastv", keep=0.25):
        by_ids = hosts.generate(llava, inputs)
        rest = {k: v for k, v in inputs.items() if k != "input_ids"}
        by_embeds = hosts.generate(llava, {"inputs_embeds": embeds, **rest})
    assert torch.equal(hosts.logits(by_ids), hosts.logits(by_embeds))


def test_right_padding_gives_the_loss_of_left_padding(llava):
    inputs = hosts.llava_inputs((1, 1), seed=14)
    mask = inputs["attention_mask"].bool()
    right = {**inputs}
    for name in ("input_ids", "attention_mask"):
        rows = [torch.cat([row[m], row[~m]]) for row, m in zip(inputs[name], mask)]
        right[name] = torch.stack(rows)
    losses = []
    with attach(llava, "fastv", keep=0.25):
        for batch in (inputs, right):
            ids = batch["input_ids"]
            labels = ids.masked_fill((ids == hosts.IMAGE) | (batch["attention_mask"] == 0), -100)
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
            labels[positions == 0] = -100  # else a padding column would have to predict it
            losses.append(llava(**batch, labels=labels, position_ids=positions).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["fastv", "transprune", "sparsevlm"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name):
    model = hosts.llava().requires_grad_(True).train()
    inputs = hosts.llava_inputs((1, 2), seed=15)
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == hosts.IMAGE) | (inputs["attention_mask"] == 0), -100)
    found = []
    with put(model, name, keep=0.25) as plugin:
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
            model.zero_grad()
            out = model(**inputs, labels=labels)
            assert out.logits.shape[1] == ids.shape[1]
            out.loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append((out.loss.detach(), grads))
            assert sum(plugin.trace.image[-1]) < 48
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], atol=1e-5, rtol=1e-3)


def test_text_only_prompts_are_left_alone(llava):
    inputs = hosts.llava_inputs((0, 0))
    plain = hosts.logits(hosts.generate(llava, inputs))
    with attach(llava, "fastv", keep=1):
        assert torch.equal(hosts.logits(hosts.generate(llava, inputs)), plain)


def test_a_prompt_without_pictures_leaves_no_stale_trace(llava):
    with attach(llava, "fastv", keep=1) as plugin:
        hosts.generate(llava, hosts.llava_inputs((1,)))
        hosts.generate(llava, hosts.llava_inputs((0,)))
        with pytest.raises(RuntimeError, match="no trace yet"):
            _ = plugin.trace


def test_pausing_leaves_new_prompts_alone(llava):
    inputs = hosts.llava_inputs((1,))
    plain = hosts.logits(hosts.generate(llava, inputs))
    with attach(llava, "fastv", keep=1) as plugin:
        with plugin.pause():
            assert torch.equal(hosts.logits(hosts.generate(llava, inputs)), plain)
        assert not torch.equal(hosts.logits(hosts.generate(llava, inputs)), plain)


def hooks(model: Any) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in model.modules()
    )


def test_detaching_leaves_nothing_behind(llava):
    before, names = hooks(llava), set(vars(llava))
    plugin = attach(llava, "fastv")
    assert hooks(llava) > before
    plugin.detach()
    plugin.detach()
    assert (hooks(llava), set(vars(llava))) == (before, names)


def test_an_exception_inside_leaves_nothing_behind(llava):
    before, names = hooks(llava), set(vars(llava))
    with pytest.raises(KeyError, match="stop"), attach(llava, "fastv") as plugin:
        plugin.method.scores = lambda view: (_ for _ in ()).throw(KeyError("stop"))
        hosts.generate(llava, hosts.llava_inputs((1,)))
    assert (hooks(llava), set(vars(llava))) == (before, names)
    assert plugin.runtime.call is None


def test_a_failed_call_does_not_disturb_the_next(llava):
    inputs = hosts.llava_inputs((1,))
    with attach(llava, "fastv", keep=0.25) as plugin:
        good = hosts.logits(hosts.generate(llava, inputs))
        scores = plugin.method.scores
        plugin.method.scores = lambda view: 1 / 0
        with pytest.raises(ZeroDivisionError):
            hosts.generate(llava, inputs)
        plugin.method.scores = scores
        assert torch.equal(hosts.logits(hosts.generate(llava, inputs)), good)


def test_a_copy_of_the_model_has_a_plugin_of_its_own(llava):
    inputs = hosts.llava_inputs((1,))
    plain = hosts.logits(hosts.generate(llava, inputs))
    with attach(llava, "fastv", keep=0.25):
        pruned = hosts.logits(hosts.generate(llava, inputs))
        twin = copy.deepcopy(llava)
    assert torch.equal(hosts.logits(hosts.generate(llava, inputs)), plain)
    assert torch.equal(hosts.logits(hosts.generate(twin, inputs)), pruned)
    plugin_of(twin).detach()
    assert torch.equal(hosts.logits(hosts.generate(twin, inputs)), plain)


def test_save_pretrained_writes_the_same_files(llava, tmp_path):
    llava.save_pretrained(tmp_path / "plain")
    with attach(llava, "fastv"):
        llava.save_pretrained(tmp_path / "attached")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "attached" / file.name).read_bytes()


def test_two_models_carry_different_plugins(llava, eager):
    inputs = hosts.llava_inputs((1,))
    with attach(llava, "fastv", keep=3) as one, attach(eager, "random", keep=7) as two:
        hosts.generate(llava, inputs, steps=1)
        hosts.generate(eager, inputs, steps=1)
        assert (one.trace.image[-1], two.trace.image[-1]) == ([3], [7])


def test_a_bf16_host_runs(llava):
    model = copy.deepcopy(llava).bfloat16()
    inputs = hosts.llava_inputs((1, 2))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with attach(model, "fastv", keep=0.25) as plugin:
        assert hosts.logits(hosts.generate(model, inputs)).isfinite().all()
        assert plugin.trace.image[-1] == [4, 8]
