"""VisionZip, PruMerge and GlobalCom2's scores, from pictures to features, against their official code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.fill import fill
from tests.fill import image as blocky
from tests.plugins import hosts
from vistok.compress.methods.prumerge import outlier_ratio
from vistok.plugins.attach import attach
from vistok.plugins.reader import TowerReader

pytestmark = pytest.mark.parity


def tower_host(clip: dict[str, Any], keys: list[Any] | None = None) -> Any:
    """A LLaVA whose tower is the golden one and whose projector is the identity."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**clip, hidden_act="quick_gelu")
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**{**hosts.TEXT, "hidden_size": vision.hidden_size, "num_hidden_layers": 2}),
        image_token_index=hosts.IMAGE,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, tensor in model.model.vision_tower.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(np.asarray(fill(f"vision_model.{name}", tuple(tensor.shape)))))
    model.model.multi_modal_projector = torch.nn.Identity()
    return model


def prompt(model: Any, batch: int, seed: int) -> dict[str, Any]:
    size = model.config.vision_config.image_size
    pixels = blocky(batch, -(-size // 16) * 16, seed)[..., :size, :size] * 2 - 1
    patches = (size // model.config.vision_config.patch_size) ** 2
    rows = [[1, 2, *[hosts.IMAGE] * patches, 3] for _ in range(batch)]
    return {**hosts.pad_left(rows), "pixel_values": pixels}


def compressed(model: Any, inputs: dict[str, Any], method: str, **config: Any) -> torch.Tensor:
    with attach(model, method, reference=True, **config) as plugin:
        prepared = plugin.prepare(inputs)
    found = torch.stack(list(prepared["mm_encoder_outputs"]["image"].pooler_output))
    assert "position_ids" not in prepared
    assert int((prepared["input_ids"] == hosts.IMAGE).sum()) == found.shape[0] * found.shape[1]
    return found


@pytest.mark.parametrize("run", ["a", "b"])
def test_visionzip_gives_the_official_features(golden, run):
    ref = golden("visionzip")
    setting = ref.meta["runs"][run]
    model = tower_host(setting["clip"])
    inputs = prompt(model, setting["batch"], setting["image_seed"])
    total = setting["dominant"] + setting["contextual"]
    found = compressed(model, inputs, "visionzip", keep=total, contextual=setting["contextual"])
    torch.testing.assert_close(found, ref[f"{run}/out"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("run", ["adaptive", "plus_adaptive", "fixed", "plus_fixed"])
def test_prumerge_gives_the_official_features(golden, run):
    ref = golden("prumerge")
    setting = ref.meta["runs"][run]
    model = tower_host(setting["clip"])
    inputs = prompt(model, setting["batch"], setting["image_seed"])
    method = "prumerge_plus" if setting["plus"] else "prumerge"
    keep = None if setting["adaptive"] else setting["ratio"]
    found = compressed(model, inputs, method, keep=keep, neighbours=setting["cluster_k"])
    assert found.shape[1] == int(ref[f"{run}/n_out"])
    expected = ref[f"{run}/out_sample"]
    off = ((found[..., :16] - expected).abs() > 5e-5).any(-1)
    assert int(off.sum()) <= found.shape[0]  # a neighbour at the edge of the 32 may fall either way
    torch.testing.assert_close(found[..., :16], expected, atol=1e-2, rtol=0)


def test_released_prumerge_takes_one_share_for_a_batch(golden):
    setting = golden("prumerge").meta["runs"]["fixed"]
    model = tower_host(setting["clip"])
    inputs = prompt(model, 2, setting["image_seed"])
    found = compressed(model, inputs, "prumerge", keep=None)
    rows = golden("prumerge")["fixed/cls_attn"]
    assert found.shape[1] == int(rows.shape[1] * outlier_ratio(rows)) + 1


def test_the_tower_gives_globalcom2s_logits(golden):
    ref = golden("globalcom2_alloc")
    clip = ref.meta["C"]["clip"]
    model = tower_host(
        {
            "image_size": clip["image"],
            "patch_size": clip["patch"],
            "hidden_size": clip["hidden"],
            "num_attention_heads": clip["heads"],
            "num_hidden_layers": clip["layers"],
            "intermediate_size": clip["mlp"],
        }
    )
    pixels = torch.tensor(np.random.default_rng(499).standard_normal((2, 3, 84, 84)).astype(np.float32))
    inputs = {"pixel_values": pixels}
    with attach(model, "globalcom2") as plugin:
        reader = TowerReader(plugin.family, model, plugin.method)
        with reader:
            plugin.family.encode(model, inputs)
        ((rows, _),) = reader.levels(inputs, "image")
    torch.testing.assert_close(torch.stack(rows), ref["C_cls_logits"], atol=1e-6, rtol=0)
