"""Two protocols are equal exactly if the figures would be."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

import vistok
from vistok.evaluate import protocol
from vistok.image import Preprocess


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.png"):
        (tmp_path / "set" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "sub" / name).write_bytes(name.encode())
    return tmp_path / "set"


def facts(folder, **options):
    return protocol.data_facts("toy", sorted(folder.rglob("*.png")), root=folder, **options)


def test_data_hash_depends_on_neither_place_nor_order(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    files = sorted((tmp_path / "elsewhere").rglob("*.png"), reverse=True)
    assert protocol.data_facts("toy", files, root=tmp_path / "elsewhere") == facts(folder)


@pytest.mark.parametrize("change", ["content", "name", "missing"])
def test_data_hash_sees_a_change(folder, change):
    before = facts(folder)["sha256"]
    file = folder / "sub" / "a.png"
    if change == "content":
        file.write_bytes(b"b.pnh")
    elif change == "name":
        file.rename(folder / "a.png")
    else:
        file.unlink()
    assert facts(folder)["sha256"] != before


def test_hash_without_contents_says_so(folder):
    assert facts(folder, contents=False)["hashed"] == "file names and sizes"


def test_model_hash_sees_one_changed_weight():
    model = torch.nn.Linear(3, 3)
    before = protocol.model_facts(model, "toy")
    assert protocol.model_facts(model, "toy") == before
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    assert protocol.model_facts(model, "toy")["sha256"] != before["sha256"]


def test_model_hash_reads_half_precision_and_scalars():
    model = torch.nn.BatchNorm2d(2).bfloat16()
    assert len(protocol.model_facts(model, "toy")["sha256"]) == 64


def test_protocol_survives_json(folder):
    collected = protocol.collect(
        data=facts(folder),
        model=protocol.model_facts(torch.nn.Linear(1, 1), "toy"),
        preprocess=Preprocess(size=(64, 64)),
        metrics={"psnr": vistok.create("metric", "psnr")},
        settings={"precision": "fp32"},
    )
    assert json.loads(json.dumps(collected)) == collected
    assert collected["preprocess"] == {
        "size": [64, 64],
        "crop": "center",
        "resample": "bicubic",
        "multiple": 1,
        "channels": 3,
        "antialias": True,
    }
    assert {"torch", "vistok", "python", "pillow"} <= set(collected["versions"])


def test_nested_values_become_dotted_rows():
    assert protocol.flatten({"a": {"b": [1, 2], "c": None}, "d": 0.5}) == [
        ("a.b", "1, 2"),
        ("a.c", "none"),
        ("d", "0.5"),
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/vistok", "eval", "a b"], "vistok eval 'a b'"),
        (["/x/vistok/__main__.py", "list"], "python -m vistok list"),
        (["tools/run.py", "x=1"], "python tools/run.py x=1"),
        (["-c"], "python"),
    ],
)
def test_command_is_as_one_would_type_it(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert protocol.command() == expected
