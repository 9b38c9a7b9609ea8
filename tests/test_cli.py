"""The command line: files in, files out, one clear line for every error a user can cause."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vistok
from vistok import tokens as container
from vistok.cli import run
from vistok.cli.errors import is_users, message
from vistok.registry import preset

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random tokenizer: 16 tokens of 8 bits, 64 x 64 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    return str(vistok.create("tokenizer", "titok_tiny").eval().save_pretrained(folder))


@pytest.fixture
def pictures(tmp_path: Path, photos: list[Path]) -> Path:
    """A folder with two photographs, one of them further down, and a file that is no picture."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    (folder / "cat.jpg").write_bytes(photos[1].read_bytes())
    (folder / "inner" / "cup.jpg").write_bytes(photos[2].read_bytes())
    (folder / "notes.txt").write_text("no picture")
    return folder


def failed(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 2) -> str:
    """Run a command that fails; its one line on stderr."""
    assert run([str(a) for a in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def ran(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that works; what it printed."""
    code = run([str(a) for a in arguments])
    output = capsys.readouterr()
    assert (code, output.err) == (0, "")
    return output.out


# -- encode, decode, reconstruct -----------------------------------------------------------------------------------


def test_encode_writes_one_file_per_picture_at_its_exact_size(
    capsys: Any, model: str, pictures: Path, tmp_path: Path
) -> None:
    said = ran(capsys, "encode", model, pictures, "--out", tmp_path / "out")
    found = sorted((tmp_path / "out").rglob("*.*"))
    assert [f.relative_to(tmp_path / "out").as_posix() for f in found] == ["cat.vtok", "inner/cup.vtok"]
    assert [f.stat().st_size for f in found] == [26, 26]
    assert "2 pictures -> " in said
    assert "52 bytes, 26 each (Tokens(1 x 16 tokens, 8 bits each))" in said


def test_decode_gives_what_the_model_decodes(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    ran(capsys, "encode", model, pictures, "--out", tmp_path / "ids")
    ran(capsys, "decode", model, tmp_path / "ids", "--out", tmp_path / "back")
    tokenizer = vistok.load(model)
    expected = vistok.image.to_pictures(tokenizer.decode(tokenizer.encode(pictures / "cat.jpg")))[0]
    with Image.open(tmp_path / "back" / "cat.png") as found:
        assert found.tobytes() == expected.tobytes()
    assert (tmp_path / "back" / "inner" / "cup.png").is_file()


def test_patterns_and_several_sources_are_taken_once(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    sources = [pictures / "cat.jpg", f"{pictures}/*.jpg"]
    assert ran(capsys, "encode", model, *sources, "--out", tmp_path / "out").startswith("1 picture -> ")


def test_reconstruct_writes_pictures_and_a_comparison(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    ran(capsys, "reconstruct", model, pictures, "--out", tmp_path / "out")
    names = sorted(f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*.png"))
    assert names == ["cat.png", "comparison.png", "inner/cup.png"]


def test_reconstruct_takes_several_token_counts(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    ran(capsys, "reconstruct", model, pictures / "cat.jpg", "--out", tmp_path / "out", "--tokens", "16")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["cat.16.png", "comparison.16.png"]


def test_a_broken_picture_is_named_and_the_others_are_done(
    capsys: Any, model: str, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "broken.png").write_text("no picture")
    line = failed(capsys, "encode", model, pictures, "--out", tmp_path / "out")
    assert line == f"Error: {pictures}/broken.png is not a picture that Pillow reads."
    assert len(list((tmp_path / "out").rglob("*.vtok"))) == 2


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: d[:20] + bytes([d[20] ^ 4]) + d[21:], "damaged: its checksum does not fit"),
        (lambda d: d[:-3], "damaged: its checksum does not fit"),
        (lambda d: b"", "not a .vtok file"),
        (lambda d: d[:4] + b"\0\0\0\0" + d[8:], "damaged"),
    ],
)
def test_a_damaged_container_is_one_line(
    capsys: Any, model: str, pictures: Path, tmp_path: Path, damage: Any, expected: str
) -> None:
    ran(capsys, "encode", model, pictures / "cat.jpg", "--out", tmp_path)
    file = tmp_path / "cat.vtok"
    file.write_bytes(damage(file.read_bytes()))
    line = failed(capsys, "decode", model, file, "--out", tmp_path / "back")
    assert line.startswith(f"Error: {file}: ")
    assert expected in line


def test_a_container_of_another_model_is_one_line(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    ran(capsys, "encode", model, pictures / "cat.jpg", "--out", tmp_path)
    other = vistok.create("tokenizer", "titok_tiny").save_pretrained(tmp_path / "other")
    line = failed(capsys, "decode", other, tmp_path / "cat.vtok", "--out", tmp_path / "back")
    assert re.search(r"cat.vtok: Model [0-9a-f]{8} wrote this .vtok file; the one given is [0-9a-f]{8}", line)


def test_a_container_with_too_few_tokens_is_named_and_the_others_are_done(
    capsys: Any, model: str, pictures: Path, tmp_path: Path
) -> None:
    tokenizer = vistok.load(model)
    tokens = tokenizer.encode(pictures / "cat.jpg")
    container.save(tokens[:, :3], tmp_path / "few.vtok", tokenizer.model_id)
    container.save(tokens, tmp_path / "whole.vtok", tokenizer.model_id)
    line = failed(capsys, "decode", model, tmp_path, "--out", tmp_path / "back")
    assert "few.vtok: titok decodes exactly 16 tokens per picture and got 3" in line
    assert (tmp_path / "back" / "whole.png").exists()


def test_containers_with_and_without_captions_are_decoded_together(
    capsys: Any, model: str, pictures: Path, tmp_path: Path
) -> None:
    tokenizer = vistok.load(model)
    tokens = tokenizer.encode(pictures / "cat.jpg")
    container.save(tokens, tmp_path / "plain.vtok", tokenizer.model_id)
    container.save(dataclasses.replace(tokens, text=("a cat",)), tmp_path / "text.vtok", tokenizer.model_id)
    ran(capsys, "decode", model, tmp_path, "--out", tmp_path / "back")
    assert (tmp_path / "back" / "plain.png").read_bytes() == (tmp_path / "back" / "text.png").read_bytes()


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    capsys: Any, model: str, pictures: Path, tmp_path: Path, command: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        line = failed(capsys, command, model, pictures, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(r"Error: .*/out/cat\.\w+: File too large", line)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_picture_cannot_take_the_place_of_the_comparison(capsys: Any, model: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "comparison.jpg")
    line = failed(capsys, "reconstruct", model, tmp_path, "--out", tmp_path / "out")
    assert "comparison.jpg and the comparison would both become" in line


def test_results_are_not_replaced_unless_asked(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    command = ["encode", model, pictures, "--out", tmp_path / "out"]
    ran(capsys, *command)
    assert "cat.vtok and 1 more exist already. Give --overwrite" in failed(capsys, *command)
    ran(capsys, *command, "--overwrite")


def test_two_files_for_one_result_are_refused(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(pictures / "cat.png")
    line = failed(capsys, "encode", model, pictures, "--out", tmp_path / "out")
    assert "would both become" in line
    assert not (tmp_path / "out").exists()


# -- nested tokenizers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random nested tokenizer: 1..16 tokens of 8 bits, 64 x 64 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nested")
    return str(vistok.create("tokenizer", "one_d_piece_tiny").eval().save_pretrained(folder))


@pytest.mark.parametrize(("option", "value"), [("--tokens", 5), ("--bytes", 15)])
def test_a_budget_of_tokens_or_bytes_is_kept(
    capsys: Any, nested: str, pictures: Path, tmp_path: Path, option: str, value: int
) -> None:
    ran(capsys, "encode", nested, pictures, "--out", tmp_path / "out", option, value)
    assert [f.stat().st_size for f in (tmp_path / "out").rglob("*.vtok")] == [15, 15]
    ran(capsys, "decode", nested, tmp_path / "out", "--out", tmp_path / "back")
    assert (tmp_path / "back" / "inner" / "cup.png").is_file()


def test_a_quality_is_reached_with_lengths_of_their_own(
    capsys: Any, nested: str, pictures: Path, tmp_path: Path
) -> None:
    said = ran(capsys, "encode", nested, pictures, "--out", tmp_path / "low", "--psnr", "1")
    assert {f.stat().st_size for f in (tmp_path / "low").rglob("*.vtok")} == {11}
    said = ran(capsys, "encode", nested, pictures, "--out", tmp_path / "high", "--psnr", "60")
    assert "2 pictures stay below 60 dB with all 16 tokens" in said
    said = ran(capsys, "encode", nested, pictures / "cat.jpg", "--out", tmp_path / "one", "--psnr", "60")
    assert "1 picture stays below 60 dB" in said


def test_several_token_counts_make_a_ladder(capsys: Any, nested: str, pictures: Path, tmp_path: Path) -> None:
    said = ran(capsys, "reconstruct", nested, pictures, "--out", tmp_path / "out", "--tokens", "1,4, 16")
    names = sorted(f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*.png"))
    assert names == sorted([f"{n}.{k}.png" for n in ("cat", "inner/cup") for k in (1, 4, 16)] + ["ladder.png"])
    assert f"compare them in {tmp_path}/out/ladder.png" in said


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("encode", ("--tokens", 4, "--psnr", 20), "--tokens, --bytes and --psnr exclude each other"),
        ("encode", ("--tokens", 17), "num_tokens is 1..16 for this tokenizer, got 17"),
        ("encode", ("--caption", "a cat"), "one_d_piece has no option 'text'"),
        ("reconstruct", ("--tokens", "1,x"), "--tokens takes integers separated by commas"),
        ("reconstruct", ("--tokens", "0"), "num_tokens is 1..16 for this tokenizer, got 0"),
        ("reconstruct", ("--tokens", "1,99"), "num_tokens is 1..16 for this tokenizer, got 99"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    capsys: Any, nested: str, pictures: Path, tmp_path: Path, command: str, options: Any, expected: str
) -> None:
    assert expected in failed(capsys, command, nested, pictures, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_captions_go_in_and_along(capsys: Any, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vistok.create("tokenizer", "ta_titok_tiny").eval().save_pretrained(tmp_path / "model")
    cat = pictures / "cat.jpg"
    ran(capsys, "encode", model, cat, "--out", tmp_path / "ids", "--caption", "a red cat")
    ran(capsys, "decode", model, tmp_path / "ids", "--out", tmp_path / "along")
    ran(capsys, "decode", model, tmp_path / "ids", "--out", tmp_path / "none", "--caption", "")
    ran(capsys, "reconstruct", model, cat, "--out", tmp_path / "both", "--caption", "a red cat")
    ran(capsys, "reconstruct", model, cat, "--out", tmp_path / "plain")
    found = {name: (tmp_path / name / "cat.png").read_bytes() for name in ("along", "none", "both", "plain")}
    assert found["along"] == found["both"] != found["none"] == found["plain"]
    ran(capsys, "eval", model, "--data", cat, "--metrics", "psnr", "--caption", "a dog", "--out", tmp_path / "eval")
    facts = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert facts["protocol"]["settings"]["text"] == "a dog"


# -- eval, train, bench --------------------------------------------------------------------------------------------


def test_eval_writes_figures_and_says_where(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    said = ran(capsys, "eval", model, "--data", pictures, "--metrics", "psnr,ssim", "--out", tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert sorted(figures["figures"]) == ["psnr", "ssim"]
    assert figures["protocol"]["model"]["name"] == model
    assert f"Wrote {tmp_path}/out/report.html" in said


def test_eval_takes_several_sources(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    data = f"{pictures}/cat.jpg, {pictures}/inner"
    said = ran(capsys, "eval", model, "--data", data, "--metrics", "psnr", "--out", tmp_path / "out")
    assert said.splitlines()[0].startswith("2 pictures")


def test_eval_names_what_it_skipped(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    (pictures / "broken.png").write_text("no picture")
    line = failed(capsys, "eval", model, "--data", pictures, "--metrics", "psnr", "--out", tmp_path / "out")
    assert "broken.png is not a picture" in line
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["pictures"] == 2


def test_runs_and_their_checkpoints_are_models_too(capsys: Any, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = ["train.steps=2", "train.global_batch=2", "train.save_every=1", f"train.out={out}", "eval=null"]
    assert run(["train", str(REPOSITORY / "recipes" / "titok" / "tiny_single.yaml"), *small]) == 0
    capsys.readouterr()
    steps, ids = sorted((out / "checkpoints").iterdir()), {}
    for name in (out, *steps, out / "tokenizer"):
        ran(capsys, "encode", name, pictures, "--out", tmp_path / "ids" / name.name)
        ids[name.name] = [file.read_bytes()[7:] for file in sorted((tmp_path / "ids" / name.name).rglob("*.vtok"))]
    assert ids["run"] == ids["tokenizer"] == ids[steps[-1].name] != ids[steps[0].name]
    assert "There are no pictures" in failed(capsys, "reconstruct", out, "--out", tmp_path / "none")
    assert "titok (tokenizer)" in ran(capsys, "info", out)
    (steps[-1] / "ema.safetensors").write_bytes(b"")
    assert run(["encode", str(out), str(pictures), "--out", str(tmp_path / "ids" / "before")]) == 0
    assert f"{steps[0].name} is taken instead" in capsys.readouterr().err
    assert [f.read_bytes()[7:] for f in sorted((tmp_path / "ids" / "before").rglob("*.vtok"))] == ids[steps[0].name]
    assert "ema.safetensors" in failed(capsys, "encode", steps[-1], pictures, "--out", tmp_path / "ids" / "broken")


def test_a_probe_that_does_not_fit_is_refused_before_anything_is_measured(
    capsys: Any, model: str, pictures: Path, tmp_path: Path
) -> None:
    command = ["eval", model, "--data", pictures, "--metrics", "psnr", "--out", tmp_path / "out", "--probe", pictures]
    assert "neither 'features'" in failed(capsys, *command, "--point", "nowhere")
    assert "that are classes" in failed(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_eval_probes_a_labelled_folder(capsys: Any, model: str, pictures: Path, tmp_path: Path) -> None:
    for label, level in (("dark", 10), ("light", 200)):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (64, 64), level + i).save(tmp_path / "set" / label / f"{i}.png")
    command = ["eval", model, "--probe", tmp_path / "set", "--point", "codes", "--out", tmp_path / "out"]
    said = ran(capsys, *command)
    found = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert f"{found['pictures']['test']} pictures, 2 classes" in said and "5 nearest" in said
    assert found["protocol"]["settings"]["point"] == "codes"
    assert "probe.json exists already" in failed(capsys, *command)
    ran(capsys, *command, "--overwrite", "--data", pictures, "--metrics", "psnr")
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_eval_without_pictures_says_what_to_give(capsys: Any, model: str, tmp_path: Path) -> None:
    assert "give pictures with --data, a labelled folder" in failed(capsys, "eval", model, "--out", tmp_path / "out")


def test_bench_writes_what_it_prints(capsys: Any, tmp_path: Path) -> None:
    command = ["bench", "tokenizer", "--model", "titok_tiny", "--batch", 1, "--rounds", 1, "--out", tmp_path / "b.json"]
    said = ran(capsys, *command)
    assert {row["operation"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]} == {"encode", "decode"}
    assert "Ids that bf16 leaves equal" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "{there}/b.json"), "is a file"),
        (("--out", "{folder}"), "is a folder. Give the name of a file"),
        (("--plot", "{folder}/new/b.bmp"), "A diagram ends in .png, .svg, .pdf"),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("vistok.evaluate.bench_quantizers.run", lambda **_: pytest.fail("worked first"))
    (tmp_path / "there").touch()
    given = [word.format(there=tmp_path / "there", folder=tmp_path) for word in words]
    assert message in failed(capsys, "bench", "quantizers", *given)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_folders_of_results_are_made(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("params,tokens,error\n1,1,0.5\n1,4,0.4\n2,1,0.4\n2,4,0.3\n")
    ran(capsys, "scaling", tmp_path / "runs.csv", "--out", tmp_path / "new" / "dir" / "law.svg")
    assert "<svg" in (tmp_path / "new" / "dir" / "law.svg").read_text()
    ran(capsys, "bench", "quantizers", "--kinds", "fsq", "--steps", 1, "--out", tmp_path / "other" / "b.json")
    assert (tmp_path / "other" / "b.json").is_file()


def test_costs_are_those_of_the_methods_asked_for(capsys: Any) -> None:
    costs = Path(__file__).parents[1] / "assets" / "methods.json"
    table = ran(capsys, "list", "method", "to*", "--costs", costs)
    assert "tome" in table and "token_corr" in table and "fastv" not in table
    assert "--costs is for methods" in failed(capsys, "list", "tokenizer", "--costs", costs)
    assert "No method fits 'nothing'" in failed(capsys, "list", "method", "nothing", "--costs", costs)


def test_bench_quantizers_prints_a_row_each_and_writes_json(capsys: Any, tmp_path: Path) -> None:
    said = ran(capsys, "bench", "quantizers", "--kinds", "fsq,bsq", "--steps", 2, "--out", tmp_path / "b.json")
    assert {row["spec"]["name"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]} == {"fsq", "bsq"}
    assert "bsq" in said


TINY = """
model:
  name: titok
  image_size: 32
  patch_size: 8
  num_tokens: 4
  encoder: {width: 32, depth: 1, heads: 2}
  decoder: {width: 32, depth: 1, heads: 2}
  quantizer: {name: fsq, levels: [8, 8]}
data: {name: photos, split: train}
losses: {mse: 1.0}
optim: {name: adamw, lr: 1.0e-3}
train: {steps: 2, global_batch: 4, out: "???", trackers: []}
eval: {data: {name: photos, split: heldout}, metrics: [psnr]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_train_ends_with_a_model_that_the_other_commands_take(capsys: Any, recipe: Path, pictures: Path) -> None:
    out = recipe.parent / "run"
    assert run(["train", str(recipe), f"train.out={out}", "train.steps=3"]) == 0
    assert "report.html" in capsys.readouterr().out
    ran(capsys, "encode", out / "tokenizer", pictures, "--out", out / "ids")


def test_train_estimates_without_leaving_a_trace(capsys: Any, recipe: Path) -> None:
    out = recipe.parent / "run"
    said = ran(capsys, "train", recipe, f"train.out={out}", "--estimate")
    assert re.search(r"^time +.* images/s", said, re.MULTILINE)
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.setps=3", "train.setps: "),
        ("model.quantizer.levels=3", "model.quantizer.levels: expected a list of int"),
        ("train.steps", "is not an override"),
        ("data.split=test", "data.split: expected one of"),
    ],
)
def test_a_wrong_override_names_its_dotted_key(capsys: Any, recipe: Path, override: str, expected: str) -> None:
    assert expected in failed(capsys, "train", recipe, "train.out=nowhere", override)


def test_a_value_left_open_is_asked_for(capsys: Any, recipe: Path) -> None:
    assert "train.out" in failed(capsys, "train", recipe)


# -- list, info ----------------------------------------------------------------------------------------------------


def test_list_without_a_kind_shows_all_kinds(capsys: Any) -> None:
    said = ran(capsys, "list")
    assert all(f"\n{kind}" in "\n" + said for kind in ("tokenizer", "quantizer", "metric", "dataset", "loss", "step"))


def test_list_takes_a_kind_and_a_pattern(capsys: Any) -> None:
    names = [line.split()[0] for line in ran(capsys, "list", "tokenizer", "titok_s*").splitlines()[1:]]
    assert names == ["titok_s128.in1k", "titok_sl256_vq8k.in1k"]


def test_list_takes_a_pattern_alone(capsys: Any) -> None:
    assert "lpips_alex" in ran(capsys, "list", "lpips*")


def test_list_pretrained_shows_only_published_weights(capsys: Any) -> None:
    said = ran(capsys, "list", "--pretrained")
    assert "titok_s128.in1k" in said
    assert "titok_tiny" not in said


def test_info_of_a_preset_shows_licences_figures_and_sizes(capsys: Any) -> None:
    said = ran(capsys, "info", "titok_s128.in1k")
    for expected in ("rFID 1.71", "Apache-2.0", "README of bytedance/1d-tokenizer", "1536", "codebook_size: 4096"):
        assert expected in said


def test_info_of_a_folder_shows_what_was_saved(tmp_path: Path, capsys: Any) -> None:
    model = vistok.create("tokenizer", "one_d_piece_tiny", num_tokens=8)
    model.save_pretrained(tmp_path / "mine")
    said = ran(capsys, "info", str(tmp_path / "mine"))
    for expected in ("one_d_piece (tokenizer)", model.model_id, "config.num_tokens", "64x64"):
        assert expected in said
    assert "holds no weight file" in failed(capsys, "info", tmp_path)


def test_info_of_a_builder_shows_its_arguments(capsys: Any) -> None:
    said = ran(capsys, "info", "vq")
    assert re.search(r"codebook_size +int +required", said)
    assert re.search(r"l2_norm +bool +false", said)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["info", "titok_s18.in1k"], "Did you mean 'titok_s128.in1k'"),
        (["list", "tokenisers"], "No registry kind named 'tokenisers'. Did you mean 'tokenizer'"),
        (["list", "zzz*"], "Nothing fits 'zzz*'"),
        (["encode", "titok_tiny", "."], "Missing option '--out'"),
        (["encode", "titok_tiny"], "Missing argument 'FILES...'. See vistok encode --help."),
        (["enkode"], "No such command 'enkode'"),
        (["encode", "--no-such-option"], "No such option: --no-such-option"),
        (["encode", "MODEL", "nowhere.png", "--out", "out"], "no file or folder 'nowhere.png'"),
        (["encode", "titok_tiny", "{pictures}", "--out", "{out}"], "'titok_tiny' has no published weights"),
        (["encode", "titok_tny", "{pictures}", "--out", "{out}"], "no preset with weights, no folder and no file"),
        (["encode", "hf-hub:org/none", "{pictures}", "--out", "{out}"], "could not be fetched from the hub"),
        (["encode", "{model}", "{pictures}", "--out", "{out}", "--tokens", "4"], "always makes 16 tokens"),
        (["encode", "{model}", "{pictures}", "--out", "{out}", "--device", "toaster"], "'toaster' cannot be used"),
        (["encode", "{model}", "{pictures}", "--out", "{out}", "--device", "meta"], "'meta' cannot be used"),
        (["encode", "{model}", "{pictures}", "--out", "{out}", "--device", "cuda:99"], "'cuda:99' cannot be used"),
        (["reconstruct", "{model}", "{pictures}", "--out", "{out}", "--tokens", "a"], "integers separated by commas"),
        (["decode", "{model}", "{pictures}", "--out", "{out}"], "There are no .vtok files in"),
        (["eval", "{model}", "--data", "{pictures}", "--out", "{out}", "--metrics", "psn"], "Did you mean 'psnr'"),
        (["train", "nowhere.yaml"], "There is no recipe 'nowhere.yaml'"),
        (["encode", "{model}", "{pictures}", "--out", "{pictures}/notes.txt"], "notes.txt"),
    ],
)
def test_an_error_of_the_user_is_one_line(
    capsys: Any, model: str, pictures: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    words = [a.format(model=model, pictures=pictures, out=tmp_path / "out") for a in arguments]
    line = failed(capsys, *words)
    assert line.startswith("Error: ")
    assert expected in line


def test_a_missing_recipe_in_an_empty_folder_lists_nothing(capsys: Any, tmp_path: Path) -> None:
    line = failed(capsys, "train", tmp_path / "a.yaml")
    assert line == f"Error: There is no recipe {str(tmp_path / 'a.yaml')!r}."


def test_a_group_without_a_command_prints_its_help_alone(capsys: Any) -> None:
    assert run(["bench"]) == 2
    output = capsys.readouterr()
    assert "tokenizer" in output.out
    assert output.err == ""


def test_a_preset_that_cannot_be_built_does_not_take_the_list_down(capsys: Any, scratch_registry: None) -> None:
    preset("tokenizer", "titok_wrong", builder="titok", config={"no_such_key": 1})
    assert run(["list", "tokenizer", "titok_*"]) == 0
    output = capsys.readouterr()
    assert "titok_tiny" in output.out
    assert "'titok_wrong' cannot be built: no_such_key" in output.err


def test_debug_shows_the_traceback_as_well(capsys: Any) -> None:
    assert run(["info", "no_such_name", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said
    assert said.splitlines()[-1].startswith("Error: Nothing named 'no_such_name'")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vistok.cli.catalogue.list_names", lambda *a, **k: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        run(["list"])


def caught(call: Any) -> BaseException:
    with pytest.raises(Exception) as found:
        call()
    return found.value


@pytest.mark.parametrize(
    ("call", "users"),
    [
        (lambda: vistok.create("quantizer", "nothing"), True),
        (lambda: vistok.create("quantizer", "vq", dim="x", codebook_size=3), True),
        (lambda: Path("/nowhere/at/all").read_text(), True),
        (lambda: {}["key"], False),
        (lambda: int("x"), False),
        (lambda: torch.zeros(2) @ torch.zeros(3), False),
    ],
)
def test_what_vistok_raises_on_purpose_is_the_users(call: Any, users: bool) -> None:
    assert is_users(caught(call)) is users


def test_a_message_of_the_system_names_the_file_first() -> None:
    assert message(caught(lambda: Path("/nowhere/at/all").read_text())) == "/nowhere/at/all: No such file or directory"


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_python_m_vistok_is_the_command() -> None:
    done = shell("-m", "vistok", "--version")
    assert (done.returncode, done.stdout) == (0, f"vistok {vistok.__version__}\n")


def test_help_lists_the_commands_and_imports_no_torch() -> None:
    done = shell("-X", "importtime", "-m", "vistok", "--help")
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    for command in ("list", "info", "train", "eval", "encode", "decode", "reconstruct", "bench"):
        assert re.search(rf"\b{command}\b", done.stdout)
    assert done.returncode == 0
    assert imported & {"torch", "numpy", "PIL", "omegaconf", "torchvision"} == set()


def test_a_closed_pipe_is_no_error_message() -> None:
    command = [sys.executable, "-m", "vistok", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()  # as `head` does when it has seen enough
    assert process.communicate(timeout=60)[1] == ""


def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        textwrap.dedent("""
        import sys, time
        from vistok.cli import catalogue, run

        def wait(*arguments, **keywords):
            print("waiting", flush=True)
            time.sleep(60)

        catalogue.list_names = wait
        sys.exit(run(["list"]))
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "Error: Interrupted.\n")


def test_bench_vlm_prints_every_method_at_every_budget(tmp_path, capsys):
    out = tmp_path / "vlm.json"
    words = ["bench", "vlm", "--method", "random", "--keep", "0.5", "--image-tokens", "16", "--rounds", "1"]
    assert run([*words, "--out", str(out)]) == 0
    assert "random" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"]


def test_bench_vlm_names_a_budget_that_is_no_number(capsys):
    assert run(["bench", "vlm", "--keep", "half"]) == 2
    assert "got 'half'" in capsys.readouterr().err
