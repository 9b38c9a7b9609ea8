"""Methods between tower and language model on every family: invariants, budgets, refusals, what they read."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

from tests.plugins import hosts, zoo
from vistok.compress.budget import Budget
from vistok.compress.signals import Level, Signals
from vistok.plugins.attach import attach
from vistok.plugins.features import encode
from vistok.registry import list_names, registry

ALL = [
    "visionzip",
    "divprune",
    "prumerge",
    "prumerge_plus",
    "fastervlm",
    "vispruner",
    "hired",
    "scope",
    "cdpruner",
    "globalcom2",
    "token_corr",
    "vqtoken",
    "frame_merge",
]
ADAPTIVE = ["prumerge", "prumerge_plus", "token_corr", "vqtoken"]
ON_HOSTS = {
    "llava_next": "globalcom2",
    "llava_onevision": "visionzip",
    "qwen2_vl": "prumerge",
    "qwen2_5_vl": "fastervlm",
    "qwen3_vl": "visionzip",
    "internvl": "token_corr",
    "idefics3": "vispruner",
    "smolvlm": "divprune",
}
"""One method a family by default, chosen so that rows, keys, tower features and crops are each read somewhere."""
RAGGED: list[tuple[int, zoo.Sample]] = [(1, [("image", 2)]), (2, [("image", 1), ("image", 3)]), (3, [])]
WITHOUT_CROPS = ("internvl", "idefics3", "smolvlm")


@cache
def host(name: str, attn: str = "sdpa") -> zoo.Host:
    return zoo.HOSTS[name](attn)


@pytest.fixture(scope="module")
def llava() -> Any:
    return hosts.llava()


def samples(found: zoo.Host) -> list[tuple[int, zoo.Sample]]:
    return [*RAGGED, (5, [("video", 2), ("image", 4)])] if found.video else RAGGED


def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return hosts.logits(hosts.generate(model, inputs, steps=2))


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_list_is_complete():
    builders = {name: registry("method").resolve(name)[1] for name in list_names("method")}
    features = {n for n, b in builders.items() if getattr(b, "stages", ()) == frozenset({"features"})}
    assert set(ALL) <= features


@pytest.mark.parametrize("name", ALL)
def test_on_llava_nothing_changes_without_need_and_batches_are_singles(llava, name):
    inputs = hosts.llava_inputs((1, 3, 0), seed=3)
    plain, attributes, hooks = logits_of(llava, inputs), set(vars(llava)), hooks_of(llava)
    for keep in (1.0, 16, Budget(ratio=1.0)):
        with attach(llava, name, keep=keep):
            assert torch.equal(logits_of(llava, inputs), plain)
    for keep in (0.4, 5, Budget(mean=5.5), *([None] if name in ADAPTIVE else [])):
        with attach(llava, name, keep=keep) as plugin:
            batch = logits_of(llava, inputs)
            found = plugin.trace.image[0]
            for r, single in enumerate(hosts.split_rows(inputs, (1, 3, 0))):
                torch.testing.assert_close(batch[r], logits_of(llava, single)[0], atol=2e-5, rtol=0)
        if name != "frame_merge" and keep is not None:  # budgets add up, clusters may be empty
            each = 6 if keep == 0.4 else 5
            assert name == "vqtoken" or found == [each, 3 * each, 0]
            assert not torch.equal(batch[:2], plain[:2])
    assert torch.equal(logits_of(llava, inputs), plain) and set(vars(llava)) == attributes
    assert hooks_of(llava) == hooks  # some are transformers' own


@pytest.mark.parametrize("name", ON_HOSTS)
def test_a_method_on_every_family(name):
    check(name, ON_HOSTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", ON_HOSTS)
def test_every_method_on_every_family(name, method):
    if method in ("hired", "globalcom2") and name in WITHOUT_CROPS:
        with pytest.raises(TypeError, match="needs crops"):
            attach(host(name).model, method)
    else:
        check(name, method)


def check(name: str, method: str) -> None:
    found = host(name)
    batch = samples(found)
    inputs = found.prompt(batch)
    plain = logits_of(found.model, inputs)
    with attach(found.model, method, keep=1.0):
        assert torch.equal(logits_of(found.model, inputs), plain)
    for keep in (0.4, 3, *([None] if method in ADAPTIVE else [])):
        with attach(found.model, method, keep=keep) as plugin:
            together = logits_of(found.model, inputs)
            trace = plugin.trace
            for row, sample in enumerate(batch):
                alone = logits_of(found.model, found.prompt([sample]))
                torch.testing.assert_close(together[row], alone[0], atol=5e-5, rtol=0)
        for kept, ids in zip(trace.kept, inputs["input_ids"]):
            assert set(ids[kept].tolist()) <= {hosts.IMAGE, zoo.VIDEO}
        assert [len(k) for k in trace.kept] == trace.image[0]
    assert torch.equal(logits_of(found.model, inputs), plain)


@pytest.mark.parametrize("method", ["hired", "globalcom2"])
@pytest.mark.parametrize("name", WITHOUT_CROPS)
def test_crops_that_nobody_can_place_are_refused(name, method):
    with pytest.raises(TypeError, match=f"{method} needs crops"):
        attach(host(name).model, method)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "smolvlm"])
def test_released_orders_are_refused_where_they_mean_nothing(name):
    with pytest.raises(TypeError, match="class token|one grid"):
        attach(host(name).model, "visionzip", reference=True)


def test_released_visionzip_needs_a_class_token():
    model = hosts.llava()
    del model.model.vision_tower.embeddings.class_embedding
    with pytest.raises(TypeError, match="has none"):
        attach(model, "visionzip", reference=True)


def test_several_feature_layers_have_no_single_class_token():
    model = hosts.llava()
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(TypeError, match="several layers"):
        attach(model, "visionzip", reference=True)


def test_a_tower_of_another_kind_is_refused(llava):
    model = copy.deepcopy(llava)
    model.model.vision_tower.encoder.layers[0].self_attn.q_proj = None
    del model.model.vision_tower.encoder.layers[0].self_attn.q_proj
    with pytest.raises(TypeError, match="cannot be read from outside"):
        attach(model, "fastervlm")


@pytest.mark.parametrize("name", ["fastervlm", "vispruner"])
def test_encoded_pictures_are_refused_by_what_reads_the_tower(llava, name):
    inputs = hosts.llava_inputs((1,))
    outputs = {"image": llava.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    with attach(llava, name, keep=4) as plugin, pytest.raises(ValueError, match="Give pixels"):
        plugin.prepare({**inputs, "mm_encoder_outputs": outputs})
    with attach(llava, "divprune", keep=4) as plugin:
        assert plugin.prepare({**inputs, "mm_encoder_outputs": outputs})["input_ids"].shape[1] < 20


def signals(found: Any, inputs: dict[str, Any], method: str, modality: str = "image", **config: Any) -> list[Any]:
    """What a method sees of the images of a prompt."""
    model = found.model if isinstance(found, zoo.Host) else found
    with attach(model, method, **config) as plugin:
        masks = plugin.family.find_placeholders(model, inputs["input_ids"], None)
        return encode(plugin.runtime, inputs, masks)[modality][1]


def attention_maps(model: Any, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """Eager attention of a tower block, (tiles, heads, T, T)."""
    pixels = inputs["pixel_values"]
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    out = tower(pixels.reshape(-1, *pixels.shape[-3:]), output_attentions=True)
    tower.set_attn_implementation("sdpa")
    return out.attentions[layer]


def test_the_class_row_is_that_of_the_attention_map(llava):
    inputs = hosts.llava_inputs((1, 2))
    maps = attention_maps(llava, inputs, -2)
    for image, found in zip(maps, signals(llava, inputs, "fastervlm", keep=4)):
        torch.testing.assert_close(found.levels[0][0], image[:, 0, 1:].mean(0), atol=1e-6, rtol=0)


def test_without_a_class_token_it_is_the_attention_received():
    found = host("llava_onevision")
    inputs = found.prompt([(1, [("image", 0)])])  # 56 x 56: overview and one crop
    maps = attention_maps(found.model, inputs, -2)
    (image,) = signals(found, inputs, "fastervlm", keep=4)
    torch.testing.assert_close(image.levels[0][0][:16], maps[0].mean((0, 1)), atol=1e-6, rtol=0)
    assert float(image.levels[0][0][20]) == 0  # a newline


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "internvl", "idefics3"])
def test_signals_lie_where_the_features_lie(name):
    """One picture alone and in company says the same, and what goes through the projector is the feature."""
    found = host(name)
    batch = found.prompt([(1, [("image", 1), ("image", 3)])])
    pair = signals(found, batch, "visionzip", keep=3)
    for seed, place in ((1, 0), (3, -1)):
        image = pair[place]
        alone = signals(found, found.prompt([(1, [("image", seed)])]), "visionzip", keep=3)[place]
        torch.testing.assert_close(image.levels[0][0], alone.levels[0][0], atol=1e-5, rtol=1e-4)
    for image in pair:
        if name.startswith("qwen"):  # what all tokens receive, in means over the four patches of a token
            torch.testing.assert_close(image.levels[0][0].sum() * 4, torch.tensor(1.0))
        torch.testing.assert_close(found.family.project(found.model, image.tower), image.features, atol=1e-5, rtol=1e-4)


def test_a_mosaic_knows_its_crops():
    found = host("llava_next")
    inputs = found.prompt([(1, [("image", 1)])])  # 100 x 50 in 2 x 1 crops
    (image,) = signals(found, inputs, "globalcom2")
    whole, mosaic = image.blocks
    assert whole.overview and mosaic.rows == (4, 4) and mosaic.cols == (4,)
    parts = mosaic.crops()
    assert [p[1] for p in parts] == [(4, 4), (4, 4)]
    assert parts[1][2].top == 4 and parts[1][2].layout == (2, 1) and parts[1][2].mosaic == (8, 4)
    features = found.model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[-2]
    tokens = found.model.model.multi_modal_projector(features[:, 1:])
    torch.testing.assert_close(image.features[parts[1][0]], tokens[2])


def test_padding_around_a_picture_is_left_out_of_its_crops():
    found = host("llava_next")
    inputs = found.prompt([(1, [("image", 2)])])  # 50 x 112: 1 x 2 crops, padded above and below
    inputs["image_sizes"] = torch.tensor([[30, 112]])
    outputs = found.family.encode(found.model, inputs)["image"]
    (_, mosaic) = found.family.blocks(found.model, outputs, inputs, "image")[0]
    assert mosaic.grid == (2, 8) and mosaic.rows == (2,) and mosaic.cols == (4, 4)


def test_globalcom2_gives_richer_crops_more():
    found = host("llava_next")
    method = registry("method").resolve("globalcom2")[1]
    inputs = found.prompt([(1, [("image", 1)])])
    (image,) = signals(found, inputs, "globalcom2")
    rows = image.levels[0][0]
    parts = [
        Signals(features=image.features[c], grid=g, cls_row=rows[c], crop=crop)
        for block in image.blocks
        for c, g, crop in block.crops()
    ]
    reductions = method(keep=0.5).compress_image(parts, 24)
    counts = [r.index.shape[1] for r in reductions]
    assert sum(counts) == 24 and counts[0] == 8
    halves = parts[0].cls_row.view(4, 4)
    assert (counts[1] > counts[2]) == bool(halves[:2].sum() > halves[2:].sum())
    released = method(keep=0.5, reference=True).compress_image(parts, 24)
    first = released[0].apply(parts[0].features[None])[0]
    order = parts[0].cls_row.argsort(descending=True)[:8]
    assert torch.equal(first, parts[0].features[order])


def test_released_globalcom2_runs_with_positions_counted_anew():
    found = host("llava_next")
    inputs = found.prompt(RAGGED)
    with attach(found.model, "globalcom2", reference=True) as plugin:
        prepared = plugin.prepare(inputs)
        logits_of(found.model, inputs)
        assert "position_ids" not in prepared and plugin.trace.image[0][0] < 30


@pytest.mark.parametrize("name", ["vqtoken", "frame_merge"])
@pytest.mark.parametrize("kind", ["llava_onevision", "qwen2_5_vl"])
def test_clips_become_shorter(kind, name):
    found = host(kind)
    inputs = found.prompt([(5, [("video", 2)])])
    with attach(found.model, name, keep=4) as plugin:
        logits_of(found.model, inputs)
        newline = int(kind == "llava_onevision")
        assert plugin.trace.image[0] == [4 + newline]


def test_clips_with_different_numbers_of_clusters_share_a_batch():
    found = zoo.HOSTS["llava_onevision"](dtype=torch.float64)
    batch = [(1, [("video", 2)]), (4, [("video", 5)]), (2, [])]
    inputs = found.prompt(batch)
    clips = inputs["pixel_values_videos"]
    clips[0, 1] = clips[0, 0]  # four features, each twice: of six clusters two stay empty
    with attach(found.model, "vqtoken", keep=6) as plugin:
        together = logits_of(found.model, inputs)
        assert plugin.trace.image[-1] == [4 + 1, 6 + 1, 0]
        for row in range(2):
            alone = {**found.prompt([batch[row]]), "pixel_values_videos": clips[row : row + 1]}
            torch.testing.assert_close(together[row], logits_of(found.model, alone)[0], atol=1e-5, rtol=0)


def test_a_still_clip_loses_nothing_to_frame_merging():
    found = host("llava_onevision")
    inputs = found.prompt([(5, [("video", 2)])])
    clips = inputs["pixel_values_videos"]
    clips[:, 1] = clips[:, 0]
    with attach(found.model, "frame_merge", keep=0.5) as plugin:
        merged = plugin.prepare(inputs)["mm_encoder_outputs"]["video"].pooler_output[0]
    full = found.family.encode(found.model, {"pixel_values_videos": clips})["video"].pooler_output[0]
    torch.testing.assert_close(merged, torch.cat([full[:4], full[-1:]]))


def test_vqtoken_reads_the_published_attention(tmp_path):
    from safetensors.torch import save_file

    from vistok.compress.hash_attention import VQAttention

    found = host("llava_onevision")
    inputs = found.prompt([(5, [("video", 2)])])
    module = VQAttention(4, 32, heads=8, inner=16).eval()
    path = str(tmp_path / "attention.safetensors")
    save_file({f"model.cross_attention.{k}": v for k, v in module.state_dict().items()}, path)
    for clusters in (1, 3):  # two frames: fewer and more clusters than frames
        with attach(found.model, "vqtoken", keep=clusters, reference=True, weights=path) as plugin:
            prepared = plugin.prepare(inputs)
            assert torch.isfinite(logits_of(found.model, inputs)).all()
        features = prepared["mm_encoder_outputs"]["video"].pooler_output[0]
        assert len(features) == max(2, clusters) + 1
        assert int((prepared["input_ids"] == zoo.VIDEO).sum()) == len(features)
    with pytest.raises(KeyError, match="No CodebookAttention"):
        attach(found.model, "vqtoken", weights=path)
    wide = str(tmp_path / "wide.safetensors")
    save_file(VQAttention(9, 32, heads=8, inner=16).state_dict(), wide)
    attached = attach(found.model, "vqtoken", keep=3, reference=True, weights=wide)
    with attached, pytest.raises(ValueError, match="frames of 9 tokens"):
        attached.prepare(inputs)


def test_vqtoken_mixes_as_the_paper_prints_it(tmp_path):
    from safetensors.torch import save_file

    from vistok.compress.hash_attention import CodebookAttention

    found = host("qwen2_vl")
    inputs = found.prompt([(5, [("video", 2)])])
    module = CodebookAttention(32, heads=2, grid=(2, 2, 2)).eval()
    path = str(tmp_path / "paper.safetensors")
    save_file(module.state_dict(), path)
    with attach(found.model, "vqtoken", keep=3) as plugin:
        means = plugin.prepare(inputs)["mm_encoder_outputs"]["video"].pooler_output[0]
    with attach(found.model, "vqtoken", keep=3, weights=path, heads=2) as plugin:
        mixed = plugin.prepare(inputs)["mm_encoder_outputs"]["video"].pooler_output[0]
        image = plugin.family.encode(found.model, inputs)["video"].pooler_output[0]
    assert mixed.shape == means.shape == (3, 32)
    similar = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(means, dim=-1).T
    grid = inputs["video_grid_thw"][0] // torch.tensor([1, 2, 2])
    expected = module(similar.argmax(1).view(1, *grid.tolist()), means[None])[0]
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    narrow = str(tmp_path / "narrow.safetensors")
    save_file(CodebookAttention(16, heads=2, grid=(2, 2, 2)).state_dict(), narrow)
    attached = attach(found.model, "vqtoken", keep=3, weights=narrow, heads=2)
    with attached, pytest.raises(ValueError, match="16 wide"):
        attached.prepare(inputs)


def test_a_class_token_among_the_features_is_refused_by_what_reads_the_tower():
    model = hosts.llava()
    model.config.vision_feature_select_strategy = "full"
    inputs = hosts.llava_inputs((1,))
    with attach(model, "fastervlm", keep=4) as plugin, pytest.raises(TypeError, match="patches alone"):
        plugin.prepare(inputs)


@pytest.mark.parametrize("name", ["visionzip", "globalcom2", "prumerge", "vqtoken"])
def test_what_became_of_the_tokens_can_be_painted(name):
    found = host("llava_next")
    with attach(found.model, name, keep=0.3) as plugin:
        logits_of(found.model, found.prompt([(1, [("image", 1)])]))
        assert plugin.show(torch.rand(3, 112, 56)).size == (56, 112)
        assert plugin.report().flops < plugin.report().flops_without


@pytest.mark.parametrize("n", [1, 2, 3, 13])
@pytest.mark.parametrize("name", ALL)
def test_pictures_of_very_few_tokens(name, n):
    generator = torch.Generator().manual_seed(n)
    level = Level(cls_row=torch.rand(n, generator=generator), keys=torch.randn(n, 2, 4, generator=generator))
    seen = Signals(
        features=torch.randn(n, 8, generator=generator),
        grid=(n, 1, 1) if name == "frame_merge" else (n, 1),
        cls_row=level.cls_row,
        keys=level.keys,
        levels=(level, level),
    )
    builder = registry("method").resolve(name)[1]
    for keep in (1, 2, 0.5, *([None] if name in ADAPTIVE else [])):
        method = builder(keep=keep)
        count = None if keep is None else method.count(n)
        (found,) = method.compress_image([seen], count)
        assert found.apply(seen.features[None]).isfinite().all()
        assert 1 <= found.index.shape[1] <= n
        assert count is None or name == "vqtoken" or found.index.shape[1] == count


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vispruner", {"important": 2.0}, "share of the budget"),
        ("vispruner", {"step": 0}, "at least one token"),
        ("hired", {"alpha": 1.0}, r"lies in \(0, 1\)"),
        ("globalcom2", {"temperature": 0.0}, "above 0"),
        ("visionzip", {"contextual": -1}, "at least 0"),
        ("visionzip", {"merge": False, "reference": True}, "released code merges"),
        ("prumerge", {"neighbours": -1}, "at least 0"),
        ("vqtoken", {"max_clusters": 0}, "at least 1"),
        ("fastervlm", {"keep": 0}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(llava, name, config, message):
    with pytest.raises(ValueError, match=message):
        attach(llava, name, **config)


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "vispruner"])
def test_half_precision_and_gradients(llava, name):
    model = copy.deepcopy(llava).bfloat16()
    inputs = hosts.llava_inputs((1, 2))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with attach(model, name, keep=5) as plugin:
        assert logits_of(model, inputs).isfinite().all()
        assert plugin.trace.image[0] == [5, 10]
    trained = copy.deepcopy(llava).requires_grad_(True)
    inputs = hosts.llava_inputs((1,))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == hosts.IMAGE, -100)
    with attach(trained, name, keep=5):
        trained(**inputs, labels=labels).loss.backward()
    assert trained.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    assert trained.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["fastervlm", "visionzip"])
def test_eager_towers_decide_the_same(name):
    inputs = hosts.llava_inputs((1, 2), seed=4)
    kept = []
    for attn in ("sdpa", "eager"):
        model = hosts.llava(attn)
        with attach(model, name, keep=6) as plugin:
            logits_of(model, inputs)
            kept.append(plugin.trace.kept)
    assert all(torch.equal(a, b) for a, b in zip(*kept))
