"""The fetcher of free picture sets, as far as it goes without a network."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import pytest
from PIL import Image

PATH = Path(__file__).parents[1] / "recipes" / "get_data.py"


@pytest.fixture(scope="module")
def get_data():
    spec = importlib.util.spec_from_file_location("get_data", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["get_data"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(get_data, monkeypatch):
    """Makes one set of what a function yields."""

    def make(function):
        monkeypatch.setitem(get_data.SETS, "photos", function)

    return make


def test_set_has_pictures_captions_and_licences(get_data, source, tmp_path):
    def one(work):
        Image.new("RGB", (200, 150)).save(work / "a.png")
        yield get_data.Found(work / "a.png", "animals/a", "CC0-1.0", "somewhere", "A grey wall.")

    source(one)
    folder = get_data.fetch("photos", tmp_path)
    (row,) = json.loads((folder / "manifest.json").read_text())["pictures"]
    assert (row["file"], row["width"], row["licence"]) == ("animals/a.png", 200, "CC0-1.0")
    assert (folder / "animals" / "a.txt").read_text() == "A grey wall.\n"


def test_small_and_broken_pictures_are_left_out_by_name(get_data, source, tmp_path):
    def three(work):
        Image.new("RGB", (200, 200)).save(work / "good.png")
        Image.new("RGB", (200, 20)).save(work / "small.png")
        (work / "broken.png").write_bytes(b"no picture")
        for name in ("good", "small", "broken"):
            yield get_data.Found(work / f"{name}.png", name, "CC0-1.0", "somewhere")

    source(three)
    manifest = json.loads((get_data.fetch("photos", tmp_path) / "manifest.json").read_text())
    assert [r["file"] for r in manifest["pictures"]] == ["good.png"]
    assert manifest["skipped"] == {"small": "200x20 pixels", "broken": "not readable"}


def test_failed_source_leaves_nothing_behind(get_data, source, tmp_path, monkeypatch, capsys):
    def none(work):
        get_data.run(["false"], work)
        yield

    source(none)
    monkeypatch.setattr(sys, "argv", ["get_data.py", "--set", "photos", str(tmp_path)])
    assert get_data.main() == 2
    assert "`false` failed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_set_lists_the_known_ones(get_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["get_data.py", "--set", "cats", str(tmp_path)])
    assert get_data.main() == 2
    assert "No set is called 'cats'. There are fashion, stamps" in capsys.readouterr().err


def test_licences_of_single_files_are_read_from_debian_copyright(get_data, tmp_path):
    file = tmp_path / "copyright"
    single = "Files: a.jpg\n b.jpg\nCopyright: 2016 N. N.\nLicense: CC-BY-4.0\n text\n"
    file.write_text(f"Format: x\n\nFiles: *\nLicense: CC0-1.0\n\n{single}")
    assert get_data._debian_licences(file) == {"*": "CC0-1.0", "a.jpg": "CC-BY-4.0", "b.jpg": "CC-BY-4.0"}


def test_idx_header_is_skipped(get_data, tmp_path):
    (tmp_path / "x").write_bytes(struct.pack(">4B2I", 0, 0, 8, 2, 1, 3) + b"abc")
    assert get_data._idx(tmp_path / "x.gz") == b"abc"


def test_title_of_a_drawing_is_its_caption(get_data, tmp_path):
    file = tmp_path / "a.svg"
    file.write_text('<svg xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title> A  red\n kite </dc:title></svg>')
    assert get_data._title(file) == "A red kite"
    file.write_text("<svg><broken")
    assert get_data._title(file) == ""
