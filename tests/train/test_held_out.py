"""Held-out pictures of every kind of data set: files, shards, tables, drawings."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import warnings
from pathlib import Path

import pytest
from PIL import Image

from tests.tokenize.test_job import Colours, job
from tests.train.tiny import BASE, recipe
from vistok.config import ConfigError, create, merge
from vistok.data.base import files_of, write_files
from vistok.tokenize.views import Views
from vistok.train.loop import train

SHORT = {"train": {"steps": 1, "save_every": 0, "ema": 0.0}, "optim": {"warmup": 0}}
PHOTOS = files_of(create("dataset", "photos", split="heldout"))[:3]


@pytest.fixture
def shard(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VISTOK_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "held-000.tar"
    with tarfile.open(path, "w") as tar:
        for i, photo in enumerate(PHOTOS):
            stream = io.BytesIO()
            Image.open(photo).convert("RGB").save(stream, "PNG")
            for name, data in ((f"{i}.png", stream.getvalue()), (f"{i}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo("9.png")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"none"))
    return path


def figures(out: Path, data: dict) -> dict:
    return train(recipe(out, merge(SHORT, {"eval": {"data": data, "metrics": ["psnr"]}}))).figures


def test_shards_give_the_figures_of_the_same_pictures_in_a_folder(shard, tmp_path):
    with pytest.warns(
        UserWarning, match="eval.data: 1 left out of the evaluation, e.g. held-000.tar:9 is not a picture"
    ):
        found = figures(tmp_path / "shards", {"name": "webdataset", "path": str(shard)})
    files = {"name": "folder", "path": [str(photo) for photo in PHOTOS]}
    assert found == pytest.approx(figures(tmp_path / "folder", files), abs=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "shards/eval/pictures.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["00000000.png", "00000001.png", "00000002.png"]
    assert (tmp_path / "shards/eval/pictures/00000002.png").is_file()


def test_captions_of_shards_reach_the_evaluation(shard, tmp_path):
    files, captions, broken = write_files(create("dataset", "webdataset", path=str(shard), captions=True), tmp_path)
    assert captions == dict.fromkeys(files, "a caption")
    assert list(broken) == ["held-000.tar:9"]


def test_drawn_scenes_can_be_held_out(tmp_path):
    assert figures(tmp_path, {"name": "scenes", "count": 2, "size": 48})["psnr"] > 0


def test_what_cannot_be_evaluated_is_refused_before_the_training(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        figures(tmp_path / "run", {"name": "folder", "path": str(tmp_path / "nowhere")})
    job(tmp_path / "ids", Colours(), views=Views(augment="flip"))
    with pytest.raises(ConfigError, match=r"eval\.data\.name: an evaluation reads pictures, and 'ids' gives tokens"):
        figures(tmp_path / "run", {"name": "ids", "path": str(tmp_path / "ids")})
    assert not (tmp_path / "run").exists()


def test_a_refused_recipe_leaves_no_folder_of_a_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    over = {"train": {"trackers": ["tensorboard"], "freeze": ["nothing.*"]}}
    with pytest.raises(ValueError, match=r"train\.freeze"):
        train(recipe(tmp_path / "run", merge(SHORT, over)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["data", "eval.data"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "folder", "path": "nowhere"}, ".path: There is no file or folder 'nowhere'"),
        ({"name": "hf", "path": "nowhere"}, ".path: There is no folder 'nowhere'"),
        ({"name": "webdataset", "path": "a-{0..1}.tar"}, ".path: There is no shard 'a-0.tar'"),
        ({"name": "folder", "path": "{photos}", "captions": True}, ": captions is true, but no picture has a caption"),
    ],
)
def test_data_that_cannot_be_opened_is_named_by_its_key(tmp_path, section, spec, message):
    pytest.importorskip("datasets", reason="the package datasets is optional")
    spec = {**spec, "path": spec["path"].replace("{photos}", str(PHOTOS[0].parent))}
    given = recipe(tmp_path / "out", {"eval": {"data": {"name": "photos"}}})
    if section == "data":
        given = dataclasses.replace(given, data=spec)
    else:
        given = dataclasses.replace(given, eval=dataclasses.replace(given.eval, data=spec))
    with pytest.raises(ConfigError, match=f"^{section}{message}"):
        train(given)
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_captions_says_once_that_there_are_none(tmp_path):
    words = {"kind": "words", "length": 4, "dim": 8}
    model = {**BASE["model"], "name": "ta_titok", "text_encoder": words, "num_tokens": 4}
    model["quantizer"] = {"name": "vq", "codebook_size": 32, "dim": 4}
    over = merge(SHORT, {"model": model})
    with pytest.warns(UserWarning, match="ta_titok reads captions .* 'photos' gives none.*data.captions=true") as seen:
        train(recipe(tmp_path / "out", over))
    assert len([w for w in seen if "reads captions" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(recipe(tmp_path / "with", merge(over, {"data": {"captions": True}})))
