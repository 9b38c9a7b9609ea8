"""Reduction inside vision transformers of timm, open_clip and transformers, alone."""

from __future__ import annotations

import copy
import io
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from tests.plugins import towers, zoo
from tests.plugins.towers import TOWERS, answer, pixels
from vistok.compress.vision import BlockView, VisionMethod
from vistok.plugins.attach import attach, plugin_of
from vistok.plugins.families.qwen_vit import in_windows

NAMES = list(TOWERS)
METHODS: dict[str, dict[str, Any]] = {"tome": {"r": 5}, "turbo": {"r": 5}, "many_to_many": {}, "cascade": {}}
NOISE = 2e-5


@cache
def tower(name: str) -> Any:
    return towers.tower(name)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_is_the_untouched_model_bit_for_bit(name):
    model, x = tower(name), pixels()
    plain = answer(model, x)
    for method in METHODS:
        with attach(model, method, keep=1.0):
            assert torch.equal(answer(model, x), plain)
    with attach(model, "tome", r=0):
        assert torch.equal(answer(model, x), plain)


@pytest.mark.parametrize("name", NAMES)
def test_merging_changes_the_output_and_detaching_takes_it_back(name):
    model, x = tower(name), pixels()
    plain, keys, before = answer(model, x), list(model.state_dict()), hooks(model)
    with attach(model, "tome", r=5) as plugin:
        assert list(model.state_dict()) == keys
        assert not torch.allclose(answer(model, x), plain)
        assert plugin.trace.mlp[-1] == plugin.trace.start - 4 * 5
    assert torch.equal(answer(model, x), plain)
    assert hooks(model) == before and plugin_of(model) is None


def hooks(model: nn.Module) -> list[Any]:
    """Everything on the instances that a plug-in could leave behind."""
    found: list[Any] = []
    for module in model.modules():
        found += [sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_single_pictures(name, method):
    model, x = tower(name), pixels(3)
    with attach(model, method, keep=0.4, **METHODS[method]):
        together = answer(model, x)
        for row, one in zip(together, x.split(1)):
            torch.testing.assert_close(row, answer(model, one)[0], atol=NOISE, rtol=1e-5)


@pytest.mark.parametrize("method", ["tome", "many_to_many"])
@pytest.mark.parametrize("name", NAMES)
def test_full_length_after_every_block_is_the_same_arithmetic(name, method):
    model, x = tower(name), pixels()
    with attach(model, method, keep=0.4):
        short = answer(model, x)
    with attach(model, method, keep=0.4, restore=True):
        full = answer(model, x)
    if name in ("Idefics3", "InternVL") or (name, method) in SOFT:
        return  # its answer here is a mean that knows nothing of sizes; pools of soft copies are pools of others
    torch.testing.assert_close(short, full, atol=NOISE, rtol=1e-4)


POOLS = ("timm, mean of patches", "timm, mean and largest", "timm, attention pool", "open_clip, LayerScale, mean")
SOFT = [(name, "many_to_many") for name in (*POOLS, "open_clip, attention pool", "SigLIP")]


def test_layer_scale_counts_where_released_tome_drops_it():
    model, x = tower("timm, LayerScale"), pixels()
    with attach(model, "tome", r=5):
        found = model.forward_features(x)
    torch.testing.assert_close(found, towers.slow_tome(model, x, 5), atol=NOISE, rtol=1e-5)
    assert not torch.allclose(found, towers.slow_tome(model, x, 5, scales=False), atol=0.1)


def test_rotary_positions_go_with_the_tokens_where_released_tome_does_nothing():
    model, x = tower("timm, EVA"), pixels()
    plain = model.forward_features(x)
    with attach(model, "tome", r=5):
        found = model.forward_features(x)
    assert found.shape[1] == plain.shape[1] - 20
    torch.testing.assert_close(found, towers.slow_tome(model, x, 5), atol=NOISE, rtol=1e-5)
    assert not torch.allclose(found, towers.slow_tome(model, x, 5, turns=False), atol=1e-3)


def test_registers_and_distillation_tokens_stay_apart():
    for name, prefix in (("timm, registers", 5), ("timm, distilled", 2), ("DINOv2, registers", 4)):
        model = tower(name)
        with attach(model, "tome", keep=4) as plugin:
            answer(model, pixels())
            assert torch.equal(plugin.sizes[:, :prefix], torch.ones(2, prefix))
            assert torch.equal(plugin.reduction.index[:, :prefix], torch.arange(prefix).expand(2, -1))


@pytest.mark.parametrize("name", ["timm", "timm, mean of patches", "timm, EVA"])
@pytest.mark.parametrize("method", METHODS)
def test_mass_is_conserved_and_labels_say_where_patches_went(name, method):
    model, x = tower(name), pixels()
    with attach(model, method, keep=0.3) as plugin:
        tokens = model.forward_features(x)
        assert tokens.shape[1] == plugin.runtime.prefix + 19 == plugin.trace.mlp[-1]
        full, labels = plugin.unmerge(tokens), plugin.labels()
    assert full.shape[1] == plugin.trace.start and labels.shape == (2, 64)
    if method == "cascade":
        assert ((labels >= 0).sum(1) == 19).all()
    else:
        patches = plugin.sizes[:, plugin.runtime.prefix :]
        torch.testing.assert_close(patches.sum(1), torch.full((2,), 64.0))
        assert (labels >= 0).all()


def test_feature_maps_come_at_full_length():
    model, x = tower("timm, LayerScale"), pixels()
    with attach(model, "tome", r=5, restore=True):
        maps = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 8, 8)] * 2
    with attach(model, "tome", r=5) as plugin:
        tokens = plugin.unmerge(model.forward_features(x))
    last = model.forward_intermediates(x, indices=1, intermediates_only=True, norm=True)[0]
    with attach(model, "tome", r=5, restore=True):
        found = model.forward_intermediates(x, indices=1, intermediates_only=True, norm=True)[0]
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens[:, 1:], atol=NOISE, rtol=1e-4)
    assert not torch.allclose(found, last)


def test_what_looks_at_patches_around_a_tower_gets_full_length():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(hidden_size=32, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=4, image_size=32,
                          patch_size=4, num_labels=5)  # fmt: skip
    model = towers.sharpen(Dinov2ForImageClassification(config))
    with attach(model, "tome", r=5) as plugin:
        assert plugin.runtime.restore
        model(pixels())
        assert plugin.trace.mlp[-1] == 65 - 15


def test_towers_inside_clip_models_are_found():
    import open_clip
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**vision, "vocab_size": 50, "max_position_embeddings": 8}
    config = CLIPConfig(text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 4})
    hugging = towers.sharpen(CLIPModel(config))
    plain = hugging.get_image_features(pixels()).pooler_output
    with attach(hugging, "tome", r=5) as plugin:
        merged = hugging.get_image_features(pixels()).pooler_output
        assert plugin.trace.mlp == [60, 55, 50] and not plugin.runtime.restore
    assert not torch.allclose(merged, plain)
    size = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 3, "head_width": 8}
    names = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1}
    model = towers.sharpen(open_clip.CLIP(embed_dim=16, vision_cfg=size, text_cfg=names))
    trunk = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "image_size": 224,
             "timm_pool": "", "timm_proj": "linear"}  # fmt: skip
    wrapped = towers.sharpen(open_clip.CLIP(embed_dim=16, vision_cfg=trunk, text_cfg=names))
    for found, side in ((model, 32), (wrapped, 224)):
        x = torch.nn.functional.interpolate(pixels(), (side, side))
        plain = found.encode_image(x)
        with attach(found, "tome", r=2) as plugin:
            assert not torch.allclose(found.encode_image(x), plain)
            assert plugin.trace.mlp[-1] < plugin.trace.start
        assert torch.equal(found.encode_image(x), plain)


@pytest.mark.parametrize("name", ["timm, LayerScale", "timm, EVA", "open_clip", "CLIP", "DINOv2"])
def test_copies_and_files_carry_their_own_plug_in(name):
    model, x = copy.deepcopy(tower(name)), pixels()
    plain = answer(model, x)
    plugin = attach(model, "tome", r=5)
    merged = answer(model, x)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    other = pixels(1, seed=3)
    for found in (twin, loaded):
        assert torch.equal(answer(found, x), merged)
        answer(found, other)  # a state of its own
        assert plugin.runtime.last is not plugin_of(found).runtime.last
        plugin_of(found).detach()
        assert torch.equal(answer(found, x), plain)
    assert torch.equal(answer(model, x), merged)
    fresh = copy.deepcopy(tower(name))
    fresh.load_state_dict(model.state_dict(), strict=True)


def test_an_average_of_weights_follows_a_model_with_a_plug_in():
    model = copy.deepcopy(tower("timm")).train().requires_grad_(True)
    attach(model, "tome", r=5)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixels()).square().sum().backward()
    optimizer.step()
    average.update_parameters(model)
    assert average.module(pixels()).shape == (2, 7)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_and_checkpointing_gives_the_same(method):
    model, x = copy.deepcopy(tower("timm, LayerScale")).requires_grad_(True), pixels()
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointed)
        with attach(model, method, keep=0.4):
            model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in grads[0][:3])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["timm, shallow", *(pytest.param(n, marks=pytest.mark.slow) for n in ("timm, EVA", "CLIP"))]
)
def test_a_compiled_model_gives_the_same(name):
    model = towers.sharpen(towers.vit(depth=2)) if name == "timm, shallow" else copy.deepcopy(tower(name))
    x = pixels()
    with attach(model, "tome", r=5):
        expected = answer(model, x)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(answer(compiled, x), expected, atol=NOISE, rtol=1e-5)
        torch.testing.assert_close(
            answer(compiled, pixels(2, seed=4)), answer(model, pixels(2, seed=4)), atol=NOISE, rtol=1e-5
        )
    torch._dynamo.reset()


def test_half_precision_keeps_sizes_in_float32():
    model, x = copy.deepcopy(tower("timm")).bfloat16(), pixels().bfloat16()
    with attach(model, "tome", r=5) as plugin:
        assert model(x).dtype == torch.bfloat16
        assert plugin.sizes.dtype == torch.float32 and plugin.sizes.sum() == 2 * 65


def test_attention_stays_fused_and_takes_sizes_only_when_they_differ(monkeypatch):
    model, x, masks = tower("timm"), pixels(), []
    fused = torch.nn.functional.scaled_dot_product_attention

    def note(*args, **kwargs):
        masks.append(kwargs.get("attn_mask"))
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with attach(model, "tome", r=[0, 5, 0, 5]):
        model(x)
    assert [m is None for m in masks] == [True, True, False, False]
    assert masks[2].shape == (2, 1, 1, 60)
    masks.clear()
    with attach(model, "tome", r=5, proportional=False):
        model(x)
    assert masks == [None] * 4


def test_the_paper_s_schedules_and_keep():
    model, x = tower("timm"), pixels()

    def left(**config: Any) -> list[int]:
        with attach(model, "tome", **config) as plugin:
            model(x)
        return [n - 1 for n in plugin.trace.mlp]

    assert left(r=(8, -1.0)) == [48, 38, 33, 33]
    assert left(r=[8.0, -1.0]) == [48, 38, 33, 33]
    assert left(r=[4, 4]) == [60, 56, 56, 56]
    assert left(keep=32) == [56, 48, 40, 32]
    assert left(keep=0.25)[-1] == 16 and left(keep=4)[-1] == 4
    assert left(keep=100) == [64] * 4
    assert left(r=30) == [34, 17, 9, 5]


def test_pausing_leaves_the_tower_alone():
    model, x = tower("timm"), pixels()
    plain = model(x)
    with attach(model, "tome", r=5) as plugin:
        with plugin.pause():
            assert torch.equal(model(x), plain)
        assert not torch.equal(model(x), plain)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": [1, 2, 3, 4, 5]}, "the tower has 4 blocks"),
        ({"r": (4, 2.0)}, "inflection"),
        ({"r": -1}, "not negative"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1}, "at most half"),
        ({"keep": 9, "r": 0}, "merges in no block"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, message):
    with pytest.raises(ValueError, match=message), attach(tower("timm"), "tome", **config):
        tower("timm")(pixels())


def test_what_a_tower_cannot_do_is_said():
    with pytest.raises(TypeError, match=r"fastv works at prefill.*many_to_many, tome, turbo"):
        attach(tower("timm"), "fastv")
    with pytest.raises(TypeError, match="No family fits a Linear"):
        attach(nn.Linear(2, 2), "fastv")
    with pytest.raises(TypeError, match="holds no known vision transformer"):
        attach(nn.Linear(2, 2), "tome")
    with pytest.raises(TypeError, match="several vision transformers: 0, 1"):
        attach(nn.ModuleList([tower("timm"), tower("CLIP")]), "tome")
    with pytest.raises(TypeError, match="ParallelThingsBlock"):
        attach(towers.timm_blocks("ParallelThingsBlock"), "tome")
    model = copy.deepcopy(tower("timm"))
    with attach(model, "tome"), pytest.raises(ValueError, match="already carries 'tome'"):
        attach(model, "turbo")
    with attach(model, "tome"), pytest.raises(ValueError, match="attention mask"):
        model(pixels(), attn_mask=torch.zeros(65, 65))
    with pytest.raises(RuntimeError, match="Nothing has run yet"):
        attach(model, "tome").trace  # noqa: B018
    with pytest.raises(ValueError, match="one ratio per block"):
        attach(tower("CLIP"), "cascade", blocks=[1, 2])
    late = attach(copy.deepcopy(tower("CLIP")), "cascade", blocks=[1, 9], ratios=[0.5, 0.3])
    with pytest.raises(ValueError, match="blocks rise inside"):
        answer(late.model, pixels())


class Watcher(VisionMethod):
    """Looks at every block and does nothing."""

    def __init__(self) -> None:
        self.seen: list[BlockView] = []

    def active(self, layer: int, depth: int, start: int) -> bool:
        return False

    def watches(self, layer: int, depth: int, start: int) -> bool:
        return True

    def in_block(self, view: BlockView) -> None:
        self.seen.append(view)


@pytest.mark.parametrize("name", NAMES)
def test_queries_and_keys_are_those_of_the_model_s_attention(name):
    model, x, method = tower(name), pixels(), Watcher()
    plain = answer(model, x)
    with attach(model, method):
        torch.testing.assert_close(answer(model, x), plain, atol=NOISE, rtol=1e-5)
    assert [view.layer for view in method.seen] == [0, 1, 2, 3]
    for view in method.seen:
        received = view.received()
        torch.testing.assert_close(received.sum(1), torch.ones(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(view.received(chunk=7), received, atol=1e-6, rtol=0)
        assert view.received(rows=5).shape == received.shape and view.metric.shape[:2] == received.shape
        if view.class_token:
            torch.testing.assert_close(view.class_row().sum(1), torch.ones(2), atol=1e-5, rtol=0)


def qwen(name: str) -> Any:
    return zoo.HOSTS[name]().model.base_model.visual


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_towers_alone(name):
    model = qwen(name)
    grids = torch.tensor([[1, 8, 4], [2, 8, 12], [1, 8, 4]])
    sizes = grids.prod(1).tolist()
    x = towers.picture(sum(sizes), 3 * 2 * model.config.patch_size**2, seed=1)
    plain = model(x, grid_thw=grids).pooler_output
    with attach(model, Watcher()):
        torch.testing.assert_close(model(x, grid_thw=grids).pooler_output, plain, atol=NOISE, rtol=1e-5)
    for method in METHODS:
        with attach(model, method, keep=1.0):
            assert torch.equal(model(x, grid_thw=grids).pooler_output, plain)
        with attach(model, method, keep=0.5) as plugin:
            together = model(x, grid_thw=grids).pooler_output
            assert together.shape == plain.shape and not torch.allclose(together, plain)
            with pytest.raises(RuntimeError, match="several sizes"):
                plugin.trace  # noqa: B018
            alone = [model(p, grid_thw=g[None]).pooler_output for p, g in zip(x.split(sizes), grids)]
            torch.testing.assert_close(together, torch.cat(alone), atol=NOISE, rtol=1e-5)
            assert plugin.trace.mlp[-1] == 4 and plugin.trace.start == 8
    assert torch.equal(model(x, grid_thw=grids).pooler_output, plain)
    with pytest.raises(ValueError, match="full length"):
        attach(model, "tome", restore=False)


def test_attention_in_windows_is_attention_under_a_mask():
    q, k, v = (towers.picture(2, 3, 20, 8, seed=i) for i in range(3))
    window = torch.randint(0, 5, (2, 20), generator=torch.Generator().manual_seed(0))
    bias = towers.picture(2, 1, 1, 20, seed=4)
    found = in_windows(q, k, v, bias, window, (6, 20), 0.3)
    mask = bias.masked_fill(window[:, None, :, None] != window[:, None, None, :], -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
