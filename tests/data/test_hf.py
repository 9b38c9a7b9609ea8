"""Hugging Face data sets from disk."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

import vistok
from vistok.data.base import fingerprint


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        vistok.create("dataset", "hf", path=str(tmp_path))


@pytest.fixture
def folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is optional")
    rows = []
    for colour in (10, 20, 30):
        data = io.BytesIO()
        Image.new("RGB", (12, 8), (colour, colour, colour)).save(data, "PNG")
        rows.append(
            {"image": {"bytes": data.getvalue(), "path": None}, "words": f"grey {colour}", "kind": colour // 10}
        )
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:40]
    features = {"image": datasets.Image(), "words": datasets.Value("string"), "kind": datasets.Value("int64")}
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "set"))
    return tmp_path / "set"


def test_rows_are_read_with_caption_and_label(folder):
    data = vistok.create("dataset", "hf", path=str(folder), split="train", caption="words", label="kind")
    sample = data.read(2)
    assert (len(data), sample.text, sample.label) == (3, "grey 30", 3)
    assert (np.asarray(sample.picture) == 30).all()
    assert fingerprint(data) == fingerprint(data)


def test_damaged_row_is_named(folder):
    data = vistok.create("dataset", "hf", path=str(folder), split="train")
    with pytest.raises(ValueError, match=r"set\[1\] is not a picture that Pillow reads"):
        data.read(1)


def test_what_is_no_data_set_is_told_in_our_words(folder):
    with pytest.raises(
        FileNotFoundError, match=r"no folder 'cifar10'\. Data sets are read from disk. Save one with .*save_to_disk"
    ):
        vistok.create("dataset", "hf", path="cifar10")
    for part in folder.rglob("*.json"):
        part.unlink()
    with pytest.raises(ValueError, match=r"set holds no data set that can be read: .*save_to_disk"):
        vistok.create("dataset", "hf", path=str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "Did you mean 'train'"),
        ({}, "got None"),
        ({"split": "train", "image": "kind"}, "Column 'kind' .*holds int64, no pictures"),
        ({"split": "train", "caption": "word"}, "no column 'word'. Did you mean 'words'"),
    ],
)
def test_wrong_split_or_column_is_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        vistok.create("dataset", "hf", path=str(folder), **options)
