"""ToMe and Turbo against their official code: matching, schedules, whole models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.fill import fill, image
from vistok.compress.match import bipartite, fold, runs
from vistok.compress.vision import rates
from vistok.plugins.attach import attach

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5


def seeded(seed: int, shape: Any) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["small", "nocls", "nocls2", "dist", "vit"])
def test_matching_equals_the_official_one(golden, case):
    ref = golden("tome")
    spec = ref.meta["match"][case]
    prefix = spec["class_token"] + spec["distill_token"]
    metric, x = seeded(spec["metric_seed"], spec["metric_shape"]), seeded(spec["x_seed"], spec["x_shape"])
    first = bipartite(metric, spec["r"], prefix=prefix, ordered=prefix > 0)
    path = f"match/{case}"
    merged = first.apply(x)
    close(merged, ref[f"{path}/wavg"])
    close(first.apply(x) * first.sizes.unsqueeze(-1), ref[f"{path}/sum"])
    close(first.sizes.unsqueeze(-1), ref[f"{path}/size"])
    assert torch.equal(first.labels(), ref[f"{path}/source_group"])
    if f"{path}/unmerged" in ref:
        close(first.unmerge(merged), ref[f"{path}/unmerged"])
    second = bipartite(first.apply(metric), spec["r"], prefix=prefix, sizes=first.sizes, ordered=prefix > 0)
    close(second.apply(merged), ref[f"{path}/wavg2"])
    close(second.sizes.unsqueeze(-1), ref[f"{path}/size2"])
    assert torch.equal(first.compose(second).labels(), ref[f"{path}/source_group2"])


@pytest.mark.parametrize("case", ["k2", "k4"])
def test_runs_equal_the_official_ones(golden, case):
    ref = golden("tome")
    spec = ref.meta["kth"][case]
    x = seeded(spec["seed"], spec["shape"])
    found = runs(x, spec["k"])
    close(found.apply(x), ref[f"kth/{case}/wavg"])
    close(found.sizes.unsqueeze(-1), ref[f"kth/{case}/size"])
    close(found.unmerge(found.apply(x))[:, : ref[f"kth/{case}/unmerged"].shape[1]], ref[f"kth/{case}/unmerged"])


def test_schedules_equal_the_official_ones(golden):
    written: dict[str, Any] = {"13,-1": (13, -1.0), "16,1": (16, 1.0), "8,0.5": (8, 0.5), "list[8,4]": [8, 4]}
    for name, expected in golden("tome").meta["schedules"].items():
        assert rates(written.get(name) or int(name), 12) == expected, name


def timm_model(spec: dict[str, Any]) -> nn.Module:
    import timm

    model = timm.create_model(spec["arch"], num_classes=spec["num_classes"], **spec["kwargs"]).eval()
    state = {k: torch.from_numpy(np.asarray(fill(k, tuple(s)))) for k, s in spec["state_dict"]}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("name", ["vit_s", "vit_s_noprop", "deit_t_distilled"])
def test_whole_models_equal_the_official_patch(golden, name):
    ref = golden("tome")
    spec = ref.meta["models"][name]
    config = spec["config"]
    model = timm_model({**config, "state_dict": config.get("state_dict") or spec["state_dict"]})
    pixels = image(config["batch"], config["img_size"], config["image_seed"]) * 2 - 1
    with torch.inference_mode():
        close(model(pixels), ref[f"{name}/base_logits"])
        for run, facts in spec["runs"].items():
            r = tuple(facts["r"]) if isinstance(facts["r"], list) else facts["r"]
            with attach(model, "tome", r=r, proportional=config.get("prop_attn", spec.get("prop_attn"))) as plugin:
                tokens = model.forward_features(pixels)
                logits = model.forward_head(tokens)
                assert [a - b for a, b in zip(plugin.trace.attention, plugin.trace.mlp)][:11] == facts["schedule"][:11]
                assert list(tokens.shape) == facts["feat_shape"]
                close(tokens[:, 0], ref[f"{name}/{run}/cls"])
                close(
                    tokens.flatten()[:: facts["stride"]][: len(ref[f"{name}/{run}/feat_sample"])],
                    ref[f"{name}/{run}/feat_sample"],
                )
                close(plugin.sizes.unsqueeze(-1), ref[f"{name}/{run}/size"])
                assert torch.equal(plugin.reduction.labels(), ref[f"{name}/{run}/source_group"])
            close(logits, ref[f"{name}/{run}/logits"])


@pytest.mark.parametrize("case", ["a5", "a1_decay", "nocls"])
def test_semantic_value_ranks_pairs_as_in_the_official_code(golden, case):
    ref = golden("turbo")
    spec = ref.meta["match"][case]
    metric, x = seeded(spec["metric_seed"], spec["metric_shape"]), seeded(spec["x_seed"], spec["x_shape"])
    value = seeded(spec["metric_seed"] + 2, spec["metric_shape"][:2]).softmax(-1)
    value = value * spec["scale_constant"] * spec["alpha"] * spec["beta"] ** abs(spec["gamma"] - spec["num_layer"])
    prefix = int(spec["class_token"])
    found = bipartite(metric, spec["r"], prefix=prefix, penalty=value, ordered=prefix > 0)
    close(found.apply(x), ref[f"match/{case}/wavg"])
    close(found.sizes.unsqueeze(-1), ref[f"match/{case}/size"])
    place = torch.arange(x.shape[1]).expand(x.shape[:2])
    ids = torch.zeros(found.index.shape, dtype=torch.int64).scatter_reduce(1, found.labels(), place, "amax")
    assert torch.equal(ids, ref[f"match/{case}/ids"])


@pytest.mark.parametrize("name", ["vit", "vit_thr"])
def test_turbo_equals_the_official_patch(golden, name):
    from timm.models.vision_transformer import VisionTransformer

    ref = golden("turbo")
    spec = ref.meta["vit"][name]
    model = VisionTransformer(
        img_size=spec["img_size"], patch_size=spec["patch"], embed_dim=spec["embed_dim"], depth=spec["depth"],
        num_heads=spec["heads"], num_classes=0,
    ).eval()  # fmt: skip
    model.load_state_dict({k: torch.from_numpy(np.asarray(fill(k, tuple(s)))) for k, s in spec["state_dict"]})
    pixels = image(spec["batch"], spec["img_size"], spec["image_seed"]) * 2 - 1
    settings = {"r": spec["r"], "weight": spec["alpha"], "decay": spec["beta"], "centre": spec["gamma"]}
    with torch.inference_mode():
        close(model.forward_features(pixels)[:, :4], ref[f"{name}/base"])
        with attach(model, "turbo", scale=30, threshold=spec["r_threshold"], **settings) as plugin:
            close(model.forward_features(pixels), ref[f"{name}/out"])
            close(plugin.sizes.unsqueeze(-1), ref[f"{name}/size"])


@pytest.mark.parametrize("case", ["fold_small", "fold_big"])
def test_the_late_fold_equals_the_official_one(golden, case):
    ref = golden("turbo")
    spec = ref.meta["folder"][case]
    x = seeded(spec["seed"], spec["shape"])
    found = fold(x, spec["r"], prefix=int(spec["class_token"]))
    features = found.apply(x)
    if case == "fold_big":
        features = features * (1 + found.sizes.log()).unsqueeze(-1)
    close(features, ref[f"folder/{case}/features"])
    close(found.sizes.unsqueeze(-1), ref[f"folder/{case}/size"])
