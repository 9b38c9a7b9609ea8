"""Training a host: only what should move moves, losses line up under every plug-in, two processes equal one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugins import local
from tests.train import tiny
from tests.train.test_processes import assert_equal_weights, finish, launch
from vistok.config import merge, write_yaml
from vistok.data.base import Batch
from vistok.data.scenes import Scenes
from vistok.plugins.attach import plugin_of
from vistok.plugins.hosts.local import LocalHost
from vistok.train.loop import train
from vistok.train.recipe import from_dict
from vistok.train.steps.base import Losses
from vistok.train.steps.vlm import IGNORED, Vlm, encode, parse

METHODS: list[Any] = [
    {"name": "random", "keep": 4},
    {"name": "fastv", "keep": 4, "layers": [1]},
    {"name": "pyramiddrop", "keep": 4},
    {"name": "transprune", "keep": 4},
    {"name": "pool", "keep": 4},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return local.save(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def batch() -> Batch:
    scenes = Scenes(count=20, size=local.SIZE)
    samples = [scenes.read(i) for i in range(3)]
    pixels = [torch.frombuffer(bytearray(s.picture.tobytes()), dtype=torch.uint8) for s in samples]
    images = torch.stack([p.view(local.SIZE, local.SIZE, 3).permute(2, 0, 1) / 255 for p in pixels])
    return Batch(images, torch.arange(3), text=tuple(s.text or "" for s in samples))


def values(folder: Path, out: Path, over: dict[str, Any] | None = None) -> dict[str, Any]:
    base = {
        "model": {"name": "local", "path": str(folder)},
        "data": {"name": "scenes", "size": local.SIZE, "count": 50, "crop": "center", "flip": 0.0},
        "losses": {"answers": 1.0},
        "optim": {"name": "adamw", "lr": 3e-3, "warmup": 2},
        "train": {"steps": 4, "global_batch": 4, "log_every": 2, "save_every": 0, "trackers": [], "out": str(out)},
    }
    return merge(base, merge({"train": {"step": {"name": "vlm"}, "ema": 0.0}}, over or {}))


def step_of(host: LocalHost, **config: Any) -> Vlm:
    step = Vlm(**config)
    step.setup(host, Losses({}))
    return step


def loss_of(step: Vlm, batch: Batch) -> torch.Tensor:
    (part,) = step.run(batch, 0, torch.Generator())
    return part.loss


def test_labels_cover_the_answers_and_the_token_that_ends_each(folder, batch):
    host = LocalHost(path=str(folder))
    turns = [parse(text) for text in batch.text or ()]
    inputs, labels = encode(host.processor, batch.images, turns)
    for row, conversation in enumerate(turns):
        learnt = host.processor.tokenizer.decode(labels[row][labels[row] != IGNORED])
        assert learnt.split() == [word for _, answer in conversation for word in (answer, "<end>")]
        assert (labels[row][inputs["attention_mask"][row] == 0] == IGNORED).all()


def test_the_loss_is_that_of_the_model_on_all_its_logits(folder, batch):
    host = LocalHost(path=str(folder))
    inputs, labels = encode(host.processor, batch.images, [parse(t) for t in batch.text or ()])
    expected = host.model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss_of(step_of(host), batch), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
def test_the_loss_lines_up_with_a_plug_in_on(folder, batch, method):
    host = LocalHost(path=str(folder))
    with torch.no_grad():
        plain = loss_of(step_of(host), batch)
        all_kept = LocalHost(path=str(folder))
        torch.testing.assert_close(loss_of(step_of(all_kept, method={**method, "keep": 1.0}), batch), plain)
    step = step_of(host, method=method)
    loss = loss_of(step, batch)
    assert loss.item() != plain.item()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in host.parameters() if p.requires_grad)
    assert plugin_of(host.model) is step.plugin


@pytest.mark.parametrize("method", [None, METHODS[1], METHODS[3]], ids=["none", "fastv", "transprune"])
def test_gradient_checkpointing_changes_nothing(folder, batch, method):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        host = LocalHost(path=str(folder), gradient_checkpointing=checkpointed, lora_rank=2).train()
        loss = loss_of(step_of(host, method=method), batch)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in host.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "moving"),
    [({}, {"projector"}), ({"projector": False, "lora_rank": 2}, {"lora"}), ({"lora_rank": 2}, {"projector", "lora"})],
)
def test_only_the_chosen_parts_move_and_the_folder_holds_the_result(folder, tmp_path, config, moving):
    from transformers import AutoModelForImageTextToText

    result = train(from_dict(values(folder, tmp_path / "run", {"model": config})))
    assert result.stopped == "done"
    before = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "host").state_dict()
    assert set(before) == set(after)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    kinds = {"projector" if "projector" in k else "lora" for k in moved}
    assert kinds == moving
    assert all(
        "projector" in k or k.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
        for k in moved
    )


def test_merged_lora_gives_the_logits_it_was_trained_with(folder, tmp_path):
    from transformers import AutoModelForImageTextToText

    host = LocalHost(path=str(folder), lora_rank=2)
    for name, p in host.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    host.save_pretrained(tmp_path)
    ids = torch.arange(4, 12).unsqueeze(0)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(input_ids=ids).logits, host.model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_a_killed_run_goes_on_bit_for_bit(folder, tmp_path):
    over = {"model": {"lora_rank": 2}, "train": {"save_every": 2}}
    train(from_dict(values(folder, tmp_path / "whole", over)))
    train(from_dict(values(folder, tmp_path / "half", over)))
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_000000004")
    assert train(from_dict(values(folder, tmp_path / "half", over))).resumed == 2
    assert_equal_weights(tmp_path / "half", tmp_path / "whole", 4, "model")


def test_a_checkpoint_is_the_trained_part_alone(folder):
    host = LocalHost(path=str(folder))
    assert all("multi_modal_projector" in key for key in host.state_dict())
    with pytest.raises(RuntimeError, match="Trained parameters differ"):
        host.load_state_dict({})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"projector": False}, "Nothing is left to train"),
        ({"lora_rank": 2, "lora_targets": ["qkv"]}, "no linear layer is called qkv"),
    ],
)
def test_settings_that_train_nothing_are_refused(folder, config, match):
    with pytest.raises(ValueError, match=match):
        LocalHost(path=str(folder), **config)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        LocalHost(path=str(tmp_path))


def test_text_that_is_no_conversation_is_refused(folder, batch):
    with pytest.raises(ValueError, match="question<tab>answer"):
        parse("a caption")
    host = LocalHost(path=str(folder))
    with pytest.raises(ValueError, match="needs conversations"):
        loss_of(step_of(host), Batch(batch.images, batch.positions))


def test_losses_on_pictures_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="makes no pictures"):
        train(from_dict(values(folder, tmp_path / "run", {"losses": {"mse": 1.0}})))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("method", [None, METHODS[1]], ids=["none", "fastv"])
def test_two_processes_move_the_same_parameters_and_agree(folder, tmp_path, method):
    over = {"model": {"lora_rank": 2}, "train": {"step": {"name": "vlm", "method": method}, "save_every": 4}}
    recipe = tmp_path / "given.yaml"
    write_yaml(values(folder, tmp_path / "two", over), recipe)
    finish(launch(recipe, world=2))
    train(from_dict(values(folder, tmp_path / "one", merge(over, {"train": {"batch": 2}}))))
    ours, theirs = tiny.weights(tmp_path / "two", 4), tiny.weights(tmp_path / "one", 4)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)
