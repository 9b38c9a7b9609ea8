"""Every family under one method per stage: identity, removal = masking, padded batches, traces."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.plugins import hosts, zoo
from vistok.plugins.attach import attach
from vistok.plugins.families.base import Family
from vistok.registry import register

NAMES = list(zoo.HOSTS)
EXACT = 1e-5
"""Bound for equal computations in another order, on hosts in float64, where norms and softmax still run in float32."""
STAGES = {
    "prefill": ("fastv", {"layers": [1]}),
    "features": ("pool", {}),
    "decode": ("snapkv", {"window": 3}),
    "vision": ("tome", {}),
}
RAGGED: list[tuple[int, zoo.Sample]] = [(1, [("image", 2)]), (2, [("image", 1), ("image", 3)]), (3, [])]


@cache
def host(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> zoo.Host:
    return zoo.HOSTS[name](attn, dtype)


def samples(found: zoo.Host, name: str) -> list[tuple[int, zoo.Sample]]:
    """A ragged batch, with a clip where the family knows clips."""
    return [*RAGGED, (5, [("video", 2), ("image", 4)])] if found.video else RAGGED


def logits_of(found: zoo.Host, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    return hosts.logits(hosts.generate(found.model, inputs, steps=3, **kwargs))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_is_the_untouched_model_bit_for_bit(name, stage):
    found = host(name)
    method, config = STAGES[stage]
    inputs = found.prompt(samples(found, name))
    plain = logits_of(found, inputs)
    with attach(found.model, method, keep=1.0, **config):
        assert torch.equal(logits_of(found, inputs), plain)
        forward = found.model(**inputs).logits
    assert torch.equal(found.model(**inputs).logits[:, -1], forward[:, -1])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_ragged_padded_batch_equals_single_samples(name, stage):
    found = host(name, dtype=torch.float64)
    method, config = STAGES[stage]
    batch = samples(found, name)
    with attach(found.model, method, keep=0.4, **config) as plugin:
        together = logits_of(found, found.prompt(batch))
        images = plugin.trace.image
        for row, sample in enumerate(batch):
            alone = logits_of(found, found.prompt([sample]))
            torch.testing.assert_close(together[row], alone[0], atol=EXACT, rtol=0)
            if sample[1]:
                assert [layer[row] for layer in images] == [layer[0] for layer in plugin.trace.image]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "config"), [STAGES["prefill"], STAGES["decode"], ("fastv", {"layers": [3]})])
@pytest.mark.parametrize("name", NAMES)
def test_removing_equals_masking(name, method, config, attn):
    found = host(name, attn, torch.float64)
    batches = [samples(found, name)]
    if attn == "eager":  # its masks are minus infinity in float64: a padding row would be NaN, with or without us
        batches = [[sample] for sample in batches[0] if sample[1]]
    for batch in batches:
        inputs = found.prompt(batch)
        with attach(found.model, method, keep=0.25, **config) as plugin:
            out = hosts.generate(found.model, inputs, steps=3)
            call = plugin.runtime.last
        tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
        expected = hosts.emulate(found.model, inputs, call, tokens, found.family)
        torch.testing.assert_close(hosts.logits(out), expected.float(), atol=EXACT, rtol=0)


MATRIX = [
    "random",
    "fastv",
    "pyramiddrop",
    "transprune",
    "sparsevlm",
    "sparsevlm_plus",
    "mustdrop",
    "snapkv",
    "h2o",
    "pool",
    "downsample",
    "random_features",
    "tome",
    "turbo",
    "many_to_many",
    "cascade",
    "mustdrop, in the tower",
]
IN_FRONT = ("sparsevlm", "pool", "downsample", "random_features", "tome", "turbo", "many_to_many", "cascade")
"""Methods that make features no masking can stand for."""


@pytest.mark.slow
@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_on_every_family(name, method):
    found = host(name, dtype=torch.float64)
    config: dict[str, Any] = {"merge": False} if method == "mustdrop" else {}
    if method == "mustdrop, in the tower":
        method, config = "mustdrop", {"similarity": 0.0, "window": 2}
    batch = samples(found, name)
    inputs = found.prompt(batch)
    plain = logits_of(found, inputs)
    with attach(found.model, method, keep=1.0, **config):
        assert torch.equal(logits_of(found, inputs), plain)
    with attach(found.model, method, keep=0.3, **config) as plugin:
        out = hosts.generate(found.model, inputs, steps=3)
        call = plugin.runtime.last
        for row, sample in enumerate(batch):
            alone = logits_of(found, found.prompt([sample]))
            torch.testing.assert_close(hosts.logits(out)[row], alone[0], atol=EXACT, rtol=0)
    if method not in IN_FRONT and "window" not in config:
        tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
        expected = hosts.emulate(found.model, inputs, call, tokens, found.family)
        torch.testing.assert_close(hosts.logits(out), expected.float(), atol=EXACT, rtol=0)


def test_a_family_can_be_registered_from_outside(scratch_registry):
    class MyLlava(type(hosts.llava())):  # type: ignore[misc]
        pass

    class Outside(Family):
        hosts = ("MyLlava",)

    register("family", "aaa_outside")(Outside)
    model = hosts.llava()
    model.__class__ = MyLlava
    with attach(model, "fastv", keep=4) as plugin:
        assert isinstance(plugin.family, Outside)
        hosts.generate(model, hosts.llava_inputs((1,)), steps=1)
        assert plugin.trace.image[-1] == [4]


@pytest.mark.parametrize("name", NAMES)
def test_pooling_shortens_the_prompt_and_puts_it_back(name):
    found = host(name)
    inputs = found.prompt(samples(found, name))
    with attach(found.model, "pool", keep=0.25) as plugin:
        out = hosts.generate(found.model, inputs, steps=2)
        trace = plugin.trace
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for kept, row, left in zip(trace.kept, inputs["input_ids"], trace.image[0]):
        assert len(kept) == left
        assert set(row[kept].tolist()) <= {hosts.IMAGE, zoo.VIDEO}
    assert trace.image[0][0] < sum(trace.images[0])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_renumbering_three_dimensional_positions_is_refused(name):
    with pytest.raises(ValueError, match="three-dimensional"):
        attach(host(name).model, "pyramiddrop", reference=True)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_downsample_recomputes_the_grid(name):
    found = host(name)
    inputs = found.prompt([(1, [("image", 1)])])
    grids = []
    hook = found.family.tower(found.model).register_forward_pre_hook(
        lambda module, args, kwargs: grids.append(kwargs["grid_thw"].tolist()), with_kwargs=True
    )
    with hook, attach(found.model, "downsample", keep=0.25) as plugin:
        found.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert plugin.trace.images == [[12]]
        assert plugin.trace.image[0] == [2]
    assert grids == [[[1, 4, 2]]]


def test_resizing_to_the_same_grid_gives_the_same_patches():
    found = host("qwen2_vl")
    patches = hosts.picture(32, 3 * 2 * 14 * 14, seed=1)
    pictures = found.family._resize(found.model, patches, [1, 8, 4], (8 // 2, 4 // 2))[0]
    assert torch.equal(pictures, patches)


def test_resized_patches_are_those_of_the_resized_picture():
    from torch.nn import functional as F

    found = host("qwen2_vl")
    image = hosts.picture(1, 3, 112, 56, seed=3)

    def patchify(x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2] // 14, x.shape[-1] // 14
        cells = x[0].view(3, h // 2, 2, 14, w // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)  # (h/2, w/2, 2, 2, C, p, p)
        return cells.unsqueeze(5).expand(*cells.shape[:5], 2, 14, 14).reshape(h * w, -1)

    small, grid = found.family._resize(found.model, patchify(image), [1, 8, 4], (2, 1))
    assert grid == [1, 4, 2]
    expected = patchify(F.interpolate(image, (56, 28), mode="bicubic", antialias=True))
    torch.testing.assert_close(small, expected, atol=1e-6, rtol=0)


def test_a_picture_of_several_tiles_is_one_image():
    found = host("internvl")
    with attach(found.model, "fastv", keep=3, layers=[1]) as plugin:
        hosts.generate(found.model, found.prompt([(1, [("image", 2), ("image", 1)])]), steps=1)
        assert plugin.trace.images == [[12, 8]]
        assert plugin.trace.image[-1] == [6]


@pytest.mark.parametrize("name", NAMES)
def test_mustdrop_merges_in_every_tower_and_keeps_its_key_set(name):
    found = host(name)
    inputs = found.prompt([(1, [("image", 1)]), (2, [("image", 1), ("image", 3)])])
    everything = {"gamma_global": 2.0, "gamma_individual": 2.0, "keys": 0.3}
    with attach(found.model, "mustdrop", similarity=-1.0, window=2, **everything) as plugin:
        logits_of(found, inputs)
        trace = plugin.trace
    assert all(first < sum(whole) for first, whole in zip(trace.image[0], trace.images))
    assert all(0 < last <= first for last, first in zip(trace.image[-1], trace.image[0]))  # at least the key set stays


def test_vision_methods_need_pixels():
    found = host("llava_next")
    inputs = found.prompt([(1, [("image", 2)])])
    outputs = found.family.encode(found.model, inputs)
    rest = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_sizes")}
    with attach(found.model, "tome"), pytest.raises(ValueError, match="encoded pictures"):
        found.model(**rest, mm_encoder_outputs=outputs)


@pytest.mark.parametrize("method", ["pool", "fastv"])
def test_a_loop_by_hand_counts_three_axes_like_generate(method):
    made = zoo.HOSTS["qwen2_vl"]()
    inputs = made.prompt([(1, [("image", 3)])])
    with attach(made.model, method, keep=2):
        whole = hosts.generate(made.model, inputs, steps=3)
        out = made.model(**inputs, use_cache=True)
        seen = [out.logits[:, -1]]
        for token in whole.sequences[0, -3:-1]:
            out = made.model(input_ids=token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            seen.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(seen, 1), hosts.logits(whole), atol=1e-5, rtol=0)
