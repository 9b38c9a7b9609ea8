"""`vistok tokenize`: what it prints, what it refuses, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vistok
from tests.test_cli import REPOSITORY, failed, ran
from tests.train.test_processes import free_port
from vistok.cli.tokenize import data_spec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    return str(vistok.create("tokenizer", "titok_tiny", image_size=32).eval().save_pretrained(folder))


@pytest.fixture
def pictures(tmp_path: Path, photos: list[Path]) -> Path:
    """Two classes with two pictures each, one of them broken."""
    for i, name in enumerate(("a/1.jpg", "a/2.jpg", "b/3.jpg")):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(photos[i].read_bytes())
    (tmp_path / "p" / "b" / "4.jpg").write_text("no picture")
    return tmp_path / "p"


def test_it_says_what_it_did_and_what_it_skipped(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    said = ran(capsys, "tokenize", model, pictures, "labels=true", "--augment", "flip", "--out", tmp_path / "out")
    assert "Encoded 6 pictures in " in said and "pictures/s" in said and "waiting for them to be read" in said
    assert "3 samples, 2 views each in 1 shard, " in said and f"-> {tmp_path / 'out'}" in said
    assert "1 picture could not be read, see skipped in manifest.json; the first, " in said and "4.jpg" in said
    data = vistok.create("dataset", "ids", path=str(tmp_path / "out"))
    assert [data.read(i).label for i in range(3)] == [0, 0, 1]
    assert data.manifest["identity"]["data"]["classes"] == ["a", "b"]
    assert data.manifest["identity"]["tokenizer"]["source"] == model
    again = ran(capsys, "tokenize", model, pictures, "labels=true", "--augment", "flip", "--out", tmp_path / "out")
    assert "Nothing is missing: every shard has its checksum." in again


def test_other_settings_are_refused_in_one_line(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    ran(capsys, "tokenize", model, pictures, "--out", tmp_path / "out")
    line = failed(capsys, "tokenize", model, pictures, "--shard-size", 7, "--out", tmp_path / "out")
    assert "tokens of another job: shards.samples was 4096, is 7" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no file or folder 'nowhere'"),
        (["{empty}"], "There are no pictures in"),
        (["labels=true"], "There is no data set"),
        (["{pictures}", "lables=true"], "data.lables: dataset 'folder' has no such key"),
        (["name=ids", "path={empty}"], "has no manifest.json"),
        (["{pictures}", "--tokens", "3"], "always makes 16 tokens"),
    ],
)
def test_wrong_data_is_one_line(
    capsys: Any, model: str, pictures: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    given = [word.format(pictures=pictures, empty=tmp_path / "empty") for word in words]
    assert said in failed(capsys, "tokenize", model, *given, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard*"))


def test_tokens_are_no_pictures(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    ran(capsys, "tokenize", model, pictures, "--out", tmp_path / "out")
    line = failed(capsys, "tokenize", model, "name=ids", f"path={tmp_path / 'out'}", "--out", tmp_path / "b")
    assert "The data set 'ids' holds tokens" in line


def test_the_path_tells_the_kind_of_data_set(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert data_spec(["train-{000..009}.tar"]) == {"name": "webdataset", "path": "train-{000..009}.tar"}
    assert data_spec([str(tmp_path)])["name"] == "hf"
    assert data_spec(["a", "b", "data.limit=3"]) == {"name": "folder", "path": ["a", "b"], "limit": 3}
    assert data_spec(["name=photos"]) == {"name": "photos"}


@pytest.mark.dist
@pytest.mark.slow
def test_accelerate_launch_writes_what_one_process_writes(model: str, tmp_path: Path) -> None:
    words = ["tokenize", model, "name=photos", "--shard-size", "5", "--augment", "flip"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    port = ["--main_process_port", str(free_port())]  # another test may hold the usual one
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", *port]
    launcher += ["-m", "vistok"]
    for start, name in ((launcher, "two"), ([sys.executable, "-m", "vistok"], "one")):
        command = [*start, *words, "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0 and done.stdout.count("34 samples") == 1, done.stderr
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(json.loads(one["manifest.json"])["shards"]) == 7
