"""The adapter for lmms-eval, run by lmms-eval itself on a tiny local host and a local task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.plugins import hosts
from vistok.config import ConfigError
from vistok.evaluate import lmms
from vistok.plugins.attach import attach

MISSING = [name for name in ("lmms_eval", "evaluate", "sacrebleu", "pytz") if find_spec(name) is None]
needs_lmms_eval = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'vistok[lmms]'")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}"
    "{{ p.text }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
WORDS = ["<pad>", "<unk>", "user", "assistant", ":", "what", "is", "this", "how", "many", "are", "there", "red", "blue"]
QUESTIONS = [("what is this", "red"), ("how many are there", "blue"), ("is there red", "red red"), ("what", "blue red")]
TASK = """
task: vistok_words{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function parts.pictures
doc_to_text: question
doc_to_target: {target}
{more}
"""
PARTS = """
from PIL import Image
def pictures(doc):
    return [Image.open(path) for path in doc["pictures"]]
def right(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(WORDS)}
    words |= {f"w{i}": i for i in range(len(WORDS), hosts.VOCAB)}
    words = {k: v for k, v in words.items() if v != hosts.IMAGE} | {"<image>": hosts.IMAGE}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny LLaVA with its processor, two tasks and their pictures."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    made = tmp_path_factory.mktemp("lmms")
    model = hosts.llava()
    model.generation_config.suppress_tokens = [hosts.IMAGE]  # a random model may say it
    model.save_pretrained(made / "host")
    side = {"height": 56, "width": 56}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=side),
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(made / "host")
    rows = []
    for i, (question, answer) in enumerate(QUESTIONS):
        paths = []
        for k in range((1, 2, 0, 1)[i]):
            pixels = hosts.picture(60, 80, 3, seed=10 * i + k).mul(60).add(128).clamp(0, 255).byte()
            Image.fromarray(pixels.numpy()).save(path := made / f"{i}-{k}.png")
            paths.append(str(path))
        rows.append({"question": question, "answer": answer, "pictures": paths})
    (made / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "tasks").mkdir()
    (made / "tasks" / "parts.py").write_text(PARTS)
    metric = "metric_list: [{{metric: {}, aggregation: mean, higher_is_better: true}}]"
    says = "generation_kwargs: {max_new_tokens: 5, until: [w20]}\nprocess_results: !function parts.right\n"
    for name, kind, target, more in (
        ("", "generate_until", "answer", says + metric.format("right")),
        (
            "_choice",
            "multiple_choice",
            "answer",
            "doc_to_choice: [red, blue, red red, blue red]\n" + metric.format("acc"),
        ),
    ):
        text = TASK.format(name=name, kind=kind, data=made / "data.jsonl", target=target, more=more)
        (made / "tasks" / f"words{name}.yaml").write_text(text)
    return made


def documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def prompt(folder: Path, doc: dict[str, Any]) -> Any:
    """A single prompt, as one would write it by hand."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder / "host")
    text = f"user : {'<image> ' * len(doc['pictures'])}{doc['question']} assistant : "
    images = [Image.open(path) for path in doc["pictures"]] or None
    return processor, processor(text=text, images=images, return_tensors="pt")


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder / "host").eval()


def by_hand(folder: Path, **method: Any) -> list[str]:
    """Answers of `attach` and `generate`, prompt by prompt."""
    model, said = load(folder), []
    with attach(model, **method):
        for doc in documents(folder):
            processor, inputs = prompt(folder, doc)
            out = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
            said.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return [text.split("w20")[0].strip() for text in said]


def test_the_entry_point_is_installed():
    (point,) = entry_points(group="lmms_eval.models", name="vistok")
    assert point.value == "vistok.evaluate.lmms:manifest"


@pytest.mark.slow
@needs_lmms_eval
def test_the_command_of_lmms_eval_gives_the_answers_of_attach(folder, tmp_path):
    args = {
        "--model": "vistok",
        "--model_args": f"pretrained={folder / 'host'},method=fastv,keep=4,layers=[2]",
        "--tasks": "vistok_words",
        "--include_path": folder / "tasks",
        "--batch_size": 3,
        "--device": "cpu",
        "--output_path": tmp_path,
    }
    line = [sys.executable, "-m", "lmms_eval", *(str(part) for pair in args.items() for part in pair), "--log_samples"]
    env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (samples,), (results,) = tmp_path.glob("*/*samples*.jsonl"), tmp_path.glob("*/*results.json")
    said = [json.loads(row) for row in samples.read_text().splitlines()]
    expected = by_hand(folder, method="fastv", keep=4, layers=[2])
    assert [row["filtered_resps"] for row in sorted(said, key=lambda row: row["doc_id"])] == expected
    log = json.loads(results.read_text())["throughput"]
    assert log["avg_image_tokens"] == pytest.approx(64 / 3)  # two prompts with one picture, one with two
    assert log["avg_image_tokens_left"] == pytest.approx(16 / 3)
    assert "image_tokens_left" in done.stdout


@pytest.mark.slow
@needs_lmms_eval
@pytest.mark.parametrize("simple", [True, False])
def test_choices_are_scored_in_the_simple_form_alone(folder, tmp_path, monkeypatch, simple):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    args = f"pretrained={folder / 'host'},method=pool,keep=4"
    given = {"model": "vistok", "model_args": args, "batch_size": 3, "device": "cpu", "force_simple": simple}
    manager = TaskManager("ERROR", include_path=str(folder / "tasks"), include_defaults=False)
    if not simple:
        with pytest.raises(AssertionError, match="generation only"):
            simple_evaluate(**given, tasks=["vistok_words_choice"], task_manager=manager)
        return
    result = simple_evaluate(**given, tasks=["vistok_words_choice"], task_manager=manager)
    model, right = load(folder), []
    choices = [answer for _, answer in QUESTIONS]
    with attach(model, "pool", keep=4):
        for doc in documents(folder):
            losses = [loss_by_hand(model, folder, doc, choice)[0] for choice in choices]
            right.append(choices[losses.index(min(losses))] == doc["answer"])
    assert result["results"]["vistok_words_choice"]["acc,none"] == sum(right) / len(right)


def loss_by_hand(model: Any, folder: Path, doc: dict[str, Any], answer: str) -> tuple[float, bool]:
    """Loss of an answer, fed token by token behind a single prompt."""
    processor, inputs = prompt(folder, doc)
    tail = processor.tokenizer.encode(answer)
    out, losses, greedy = model(**inputs), [], True
    for token in tail:
        scores = out.logits[0, -1].log_softmax(-1)
        losses.append(-float(scores[token]))
        greedy = greedy and int(scores.argmax()) == token
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
    return sum(losses) / len(losses), greedy


METHODS = [{"method": "fastv", "keep": 4}, {"method": "pool", "keep": 4}, {"method": "snapkv", "keep": 4}, {}]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.get("method", "none"))
def test_a_batch_of_choices_has_the_losses_of_single_ones(folder, method):
    adapter = lmms.Simple(str(folder / "host"), device="cpu", batch_size=4, **method)
    docs = documents(folder)
    chats = [chat_of(doc) for doc in docs]
    answers = ["red", "blue w33 w19", "w33", "red red"]  # the third is what the host says
    found = adapter._losses(chats, answers)
    expected = [loss_by_hand(adapter.model, folder, doc, answer) for doc, answer in zip(docs, answers)]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[2][1]


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda method: method["method"])
def test_a_batch_of_answers_is_that_of_attach(folder, method):
    adapter = lmms.Simple(str(folder / "host"), device="cpu", batch_size=4, **method)
    said = adapter._answers([chat_of(doc) for doc in documents(folder)], {"max_new_tokens": 5, "until": ["w20"]})
    assert [text.strip() for text, _ in said] == by_hand(folder, **method)
    assert all(0 < count <= 5 for _, count in said)


def chat_of(doc: dict[str, Any]) -> lmms.Chat:
    pictures = [lmms.shown(Image.open(path)) for path in doc["pictures"]]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["question"]}]}]


def test_settings_are_those_of_a_yaml_file(folder, tmp_path):
    written = tmp_path / "late.yml"
    written.write_text("name: fastv\nlayers: [4]\n")
    host = str(folder / "host")
    by_text = lmms.Simple(host, method="fastv", device="cpu", layers="[4]", keep="{mean: 8}").plugin
    by_file = lmms.Simple(host, method=str(written), device="cpu", keep="{mean: 8}").plugin
    assert by_text is not None and by_file is not None
    assert by_text.method.config() == by_file.method.config()
    assert by_text.method.config()["layers"] == (4,)


def test_what_does_not_fit_is_refused(folder):
    host = str(folder / "host")
    with pytest.raises(ConfigError, match="keep: settings of a method, but no method"):
        lmms.Simple(host, keep=0.5)
    with pytest.raises(ValueError, match="batch_size: expected a number"):
        lmms.Simple(host, batch_size="auto")
    with pytest.raises(ConfigError, match=r"kep: method 'fastv' has no such key\. Did you mean 'keep'"):
        lmms.Simple(host, method="fastv", device="cpu", kep=0.5)
    with pytest.raises(KeyError, match="Did you mean 'fastv'"):
        lmms.Simple(host, method="fatv", device="cpu")
    with pytest.raises(NotImplementedError, match="one round"):
        lmms.Simple(host, device="cpu").generate_until_multi_round([])
    with pytest.raises(NotImplementedError, match="--force_simple"):
        lmms.Talking(host, device="cpu").loglikelihood([])


def test_parts_of_messages():
    picture = Image.new("L", (4, 4))
    assert lmms.shown(picture)["image"].mode == "RGB"
    assert lmms.shown({"type": "image", "url": picture})["image"].mode == "RGB"
    assert lmms.shown("a/b.PNG") == {"type": "image", "image": "a/b.PNG"}
    assert lmms.shown("a/b.mp4") == {"type": "video", "video": "a/b.mp4"}
    assert lmms.shown({"type": "video", "url": "a"}) == {"type": "video", "video": "a"}
    assert lmms.shown({"type": "text", "text": "a"}) == {"type": "text", "text": "a"}
    with pytest.raises(ValueError, match="this task brings audio"):
        lmms.shown({"type": "audio", "url": "a.wav"})


def test_options_of_generation():
    settings, until = lmms.generation({"max_new_tokens": 7, "temperature": 0, "until": None})
    assert settings == {"max_new_tokens": 7, **lmms.GREEDY} and until == []
    assert lmms.generation({"until": "a"}) == ({"max_new_tokens": lmms.LONGEST, **lmms.GREEDY}, ["a"])
    warm, _ = lmms.generation({"temperature": 0.7, "top_p": 0.9, "max_gen_toks": 3})
    assert warm == {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9, "do_sample": True}
    assert lmms.generation({"do_sample": False, "temperature": 0.7})[0]["temperature"] is None
    with pytest.warns(UserWarning, match="left out: image_aspect_ratio"):
        lmms.generation({"image_aspect_ratio": "original"})


def test_an_answer_ends_before_the_first_of_its_endings():
    assert lmms.before("a b. c d", ["d", "."]) == "a b"
    assert lmms.before("a b", ["x"]) == "a b"


def test_batches_hold_equal_options():
    assert list(lmms._batches(["a", "b", "a", "a", "b"], 2)) == [[0, 2], [3], [1, 4]]
