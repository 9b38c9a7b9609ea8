"""Questions about scenes, with and without compression: the figures belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.plugins import hosts, local
from vistok.cli import run as vistok
from vistok.config import check_component, create, read_yaml
from vistok.data.scenes import Question, Scenes
from vistok.evaluate import bench_scenes
from vistok.evaluate.bench_scenes import Item, SceneBench, ask, inside_share, run, table, wilson
from vistok.evaluate.vlm import settings_of

SCENES = Scenes(split="heldout", size=local.SIZE, count=30)
SETTINGS = sorted((Path(__file__).parents[2] / "recipes" / "vlm" / "settings").glob("*.yml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return local.save(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def result(folder) -> SceneBench:
    methods = ["random", "pool", "downsample", {"name": "fastv", "layers": [1]}]
    return run(folder, methods=methods, keep=(4,), scenes=SCENES, questions=10, batch=4, rounds=1)


def test_the_plain_model_leads_and_every_method_follows(result):
    assert [row["method"] for row in result.rows] == ["none", "random", "pool", "downsample", "fastv"]
    assert [row["image_left"] for row in result.rows] == [16, 4, 4, 4, 4]
    assert (result.questions, result.image_tokens) == (10, 16)


def test_the_accuracy_is_that_of_the_answers(folder, monkeypatch):
    items = list(ask(SCENES, 10))
    right = [item.question.answer for item in items]
    said = iter([right[0].upper() + ". ", right[1], *["wrong"] * 8])

    class Tokenizer:
        padding_side = "left"

        def batch_decode(self, ids, skip_special_tokens):
            return [next(said) for _ in ids]

        def __getattr__(self, name):
            return getattr(made.tokenizer, name)

    made = local.processor()
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder)

    class Processor:
        tokenizer = Tokenizer()
        apply_chat_template = made.apply_chat_template

        def __call__(self, **kwargs):
            return made(**kwargs)

    found = run(model, processor=Processor(), methods=[], scenes=SCENES, questions=10, rounds=1)
    assert found.rows[0]["accuracy"] == 0.2


def test_without_compression_the_evidence_holds_its_share_of_the_picture(result):
    shares = [r["inside"] for r in result.rows]
    assert all(0 < share < 1 for share in shares)
    expected = []
    for item in ask(SCENES, 10):
        if item.question.boxes:
            mask = torch.ones(16, dtype=torch.bool)
            expected.append(inside_share(torch.arange(16), mask, item, local.SIZE))
    assert shares[0] == pytest.approx(sum(expected) / len(expected))


def test_kept_tokens_are_looked_up_where_the_placeholders_stand():
    question = Question(kind="what", text="", answer="", boxes=((0, 0, 28, 28),))  # the upper left 2 x 2 of 4 x 4
    item = Item(None, question, 2)  # type: ignore[arg-type]
    placeholders = torch.tensor([False] * 3 + [True] * 16 + [False] * 5)
    assert inside_share(torch.tensor([3, 4, 7, 8]), placeholders, item, 56) == 1.0
    assert inside_share(torch.tensor([3, 5, 18, 8]), placeholders, item, 56) == 0.5
    assert inside_share(torch.tensor([3]), placeholders[:-6], item, 56) is None  # 15 tokens lie on no square grid


def test_chance_and_the_most_frequent_answer(result):
    items = list(ask(SCENES, 10))
    assert result.chance == pytest.approx(sum(1 / item.choices for item in items) / 10)
    assert result.chance <= result.constant <= 1


def test_fewer_tokens_cost_less_memory(result):
    plain, *_, fastv = result.rows
    assert fastv["cache_bytes"] < plain["cache_bytes"]
    assert result.rows[2]["peak_bytes"] < plain["peak_bytes"]


def test_wilson_interval():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(ValueError, match="Raise the count of scenes"):
        list(ask(Scenes(count=2, size=56), 100))


def test_a_model_comes_with_its_processor():
    with pytest.raises(ValueError, match="Give the model's processor"):
        run(hosts.llava())


def test_the_command_prints_the_table_and_draws_the_plot(folder, tmp_path, capsys):
    words = ["bench", "vlm", "--model", folder, "--task", "scenes", "--method", "random", "--keep", "4,0.5"]
    paths = ["--plot", tmp_path / "plot.png", "--out", tmp_path / "out.json"]
    assert vistok([str(w) for w in (*words, "--questions", 6, "--rounds", 1, *paths)]) == 0
    said = capsys.readouterr().out
    assert "6 questions about" in said
    assert "Guessing" in said
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert [row["image_left"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [16, 4, 8]


def test_a_sweep_of_a_directory_gives_table_and_plot(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = tmp_path / "late.yaml"
    setting.write_text("name: fastv\nlayers: [2]\n")
    words = ["bench", "vlm", "--model", folder, "--sweep", "--method", setting, "--rounds", 1]
    assert vistok([str(w) for w in words]) == 0
    said = capsys.readouterr().out
    assert said.count("late") == 6
    assert (tmp_path / "vlm_sweep.png").is_file()


def test_scenes_need_a_model(capsys):
    assert vistok(["bench", "vlm", "--task", "scenes"]) == 2
    assert "needs --model" in capsys.readouterr().err


def test_a_directory_without_a_model_is_named(tmp_path, capsys):
    assert vistok(["bench", "vlm", "--model", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_a_setting_with_a_budget_of_its_own_is_not_swept(tmp_path):
    (tmp_path / "half.yaml").write_text("name: fastv\nkeep: 0.5\n")
    found = settings_of([str(tmp_path / "half.yaml"), "random"], (0.25, 9))
    assert [(s.label, s.keep) for s in found] == [("half", 0.5), ("random", 0.25), ("random", 9)]


def test_a_setting_without_a_method_is_refused(tmp_path):
    (tmp_path / "nothing.yaml").write_text("keep: 0.5\n")
    with pytest.raises(ValueError, match="needs the name of its method"):
        settings_of([str(tmp_path / "nothing.yaml")], (0.5,))


@pytest.mark.parametrize("path", SETTINGS, ids=lambda p: p.stem)
def test_named_settings_in_the_repository_fit_their_methods(path):
    assert check_component("method", read_yaml(path), "")


def test_every_column_of_the_table_is_filled(result):
    heads, cells = table(result)
    assert all(len(row) == len(heads) for row in cells)
    assert bench_scenes.caption(result).startswith("10 questions about")


def test_a_method_without_a_budget_is_asked_once_with_the_tokens_it_gives(folder, tmp_path):
    config = {"dim": 32, "out_dim": 32, "levels": [1, 2], "grid": [4, 4], "window": 2}
    create("compressor", "token_packer", **config).save_pretrained(tmp_path)
    method = {"name": "token_packer", "compressor": str(tmp_path)}
    assert [s.keep for s in settings_of([method, "random"], [0.5, 4])] == [None, 0.5, 4]
    rows = run(folder, methods=[method], keep=[0.5, 4], scenes=SCENES, questions=4, rounds=1).rows
    assert [(row["method"], row["keep"], row["image_left"]) for row in rows] == [
        ("none", 1.0, 16),
        ("token_packer", 4, 4),
    ]
