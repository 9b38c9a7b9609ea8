"""Folders, captions, classes, and the bundled photographs."""

from __future__ import annotations

import pytest
from PIL import Image

import vistok
from vistok.config import ConfigError
from vistok.data.base import Dataset, captions_of, files_of, fingerprint
from vistok.data.bundled import HELD_OUT


@pytest.fixture
def folder(tmp_path):
    for name in ("b/dog1", "a/cat1", "a/cat2"):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (10, 20, 30)).save(file)
    (tmp_path / "a" / "cat1.txt").write_text(" a cat \n")
    (tmp_path / "notes.md").write_text("not a picture")
    return tmp_path


def folder_set(path, **options):
    return vistok.create("dataset", "folder", path=str(path), **options)


def test_every_registered_dataset_is_one(folder):
    assert isinstance(folder_set(folder), Dataset)
    assert isinstance(vistok.create("dataset", "photos"), Dataset)


def test_pictures_are_found_below_and_sorted(folder):
    assert [f.name for f in files_of(folder_set(folder))] == ["cat1.png", "cat2.png", "dog1.png"]


def test_patterns_and_lists_are_joined_without_repeats(folder):
    data = vistok.create("dataset", "folder", path=[str(folder / "b"), str(folder / "*" / "*1.png")])
    assert [f.name for f in data.files] == ["dog1.png", "cat1.png"]


def test_captions_lie_beside_and_may_be_absent(folder):
    data = folder_set(folder, captions=True)
    assert [data.read(i).text for i in range(3)] == ["a cat", "", ""]


def test_a_broken_picture_does_not_hide_the_captions_of_the_others(folder):
    (folder / "a" / "cat1.png").write_bytes(b"no picture")
    (folder / "a" / "cat2.txt").write_text("another cat")
    found = captions_of(folder_set(folder, captions=True))
    assert {file.name: text for file, text in found.items()} == {"cat2.png": "another cat", "dog1.png": ""}
    assert captions_of(folder_set(folder)) is None


def test_captions_without_any_file_are_refused(folder):
    with pytest.raises(ValueError, match=r"captions is true.*dog1\.txt"):
        folder_set(folder / "b", captions=True)


def test_folder_names_are_classes(folder):
    data = folder_set(folder, labels=True)
    assert data.classes == ["a", "b"]
    assert [data.read(i).label for i in range(3)] == [0, 0, 1]


def test_exclude_and_limit(folder):
    assert [f.stem for f in folder_set(folder, exclude=["cat1"], limit=1).files] == ["cat2"]
    with pytest.raises(ValueError, match="all excluded"):
        folder_set(folder / "b", exclude=["dog1"])


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        folder_set(tmp_path / "nowhere")


def test_fingerprint_sees_names_and_their_order(folder):
    before = fingerprint(folder_set(folder))
    assert before == fingerprint(folder_set(folder))
    (folder / "a" / "cat2.png").rename(folder / "a" / "cat3.png")
    assert before != fingerprint(folder_set(folder))


def test_photos_split_into_34_and_8_by_name():
    train, held = (vistok.create("dataset", "photos", split=s) for s in ("train", "heldout"))
    assert len(train) == 34
    assert tuple(f.stem for f in held.files) == HELD_OUT
    assert not set(train.files) & set(held.files)


def test_photos_have_captions_and_a_permissive_subset():
    assert vistok.create("dataset", "photos", split="heldout", captions=True).read(0).text.startswith("A close-up")
    assert len(vistok.create("dataset", "photos", split="all", permissive=True)) == 37


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="split"):
        vistok.create("dataset", "photos", split="test")
