"""The loop: what it writes, that it continues exactly, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import warnings

import pytest
import torch

import vistok
from tests.train.tiny import recipe, weights
from tests.train.tiny import values as tiny_values
from vistok.config import ConfigError
from vistok.hub import LoadError
from vistok.registry import register, registry
from vistok.train import checkpoint, log
from vistok.train.guard import Diverged
from vistok.train.loop import train
from vistok.train.recipe import from_dict, load
from vistok.train.steps.reconstruct import Reconstruct


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps without interruption."""
    out = tmp_path_factory.mktemp("straight")
    return train(recipe(out))


@pytest.fixture
def step():
    """Register a step class for one test."""
    names = []

    def add(kind: type) -> str:
        register("step", kind.__name__.lower())(kind)
        names.append(kind.__name__.lower())
        return names[-1]

    yield add
    for name in names:
        del registry("step").builders[name]


class After(Reconstruct):
    """Calls `act` at the end of step `at`'s forward pass."""

    at = 2

    def run(self, batch, step, generator):
        yield from super().run(batch, step, generator)
        if step == self.at:
            self.act()


@pytest.mark.parametrize("name", ["model", "ema"])
def test_six_steps_equal_three_and_three_more(straight, tmp_path, step, name):
    class Stopped(After):
        registry_name = "reconstruct"

        def act(self):
            os.kill(os.getpid(), signal.SIGTERM)

    kind = step(Stopped)
    first = train(recipe(tmp_path, {"train": {"step": {"name": kind}}}))
    assert (first.stopped, first.step) == ("signal", 3)
    second = train(recipe(tmp_path, {"train": {"resume": "anyway"}}))
    assert (second.resumed, second.step) == (3, 6)
    assert equal(weights(straight.out, 6, name), weights(tmp_path, 6, name))


def test_optimizer_state_is_continued_exactly(straight, tmp_path):
    train(recipe(tmp_path, {"train": {"step": {"name": "reconstruct"}, "save_every": 3}}))
    for old in checkpoint.folders(tmp_path)[1:]:
        os.rename(old, tmp_path / "gone")
    train(recipe(tmp_path))
    ours, theirs = (checkpoint.newest(out).optimizers["model"]["state"] for out in (tmp_path, straight.out))
    assert all(torch.equal(ours[i][k], theirs[i][k]) for i in theirs for k in theirs[i])


GAN = {
    "name": "reconstruct_gan",
    "discriminator": {"name": "titok_discriminator", "width": 32, "stages": 2, "grid": 4},
    "gan": {"name": "hinge_gan", "lecam": 0.1},
}
VARIANTS = {
    "ema_codebook": {"model": {"quantizer": {"name": "vq_ema", "codebook_size": 32, "dim": 4, "kmeans_init": True}}},
    "clustering": {"model": {"quantizer": {"name": "cvq", "codebook_size": 32, "dim": 4}}},
    "gaussian": {"model": {"quantizer": {"name": "gaussian", "dim": 4}}},
    "muon": {"optim": {"name": "muon", "lr": 1e-3}},
    "bf16": {"train": {"precision": "bf16"}},
    "accumulated": {"train": {"batch": 2}},
    "adversarial": {"losses": {"adversarial": {"weight": 0.1, "start": 1}}, "train": {"step": GAN}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_is_exact_whatever_is_trained(tmp_path, name):
    train(recipe(tmp_path, VARIANTS[name]))
    last = checkpoint.folders(tmp_path)[-1]
    straight = checkpoint.load(last)
    shutil.rmtree(last)
    assert train(recipe(tmp_path, VARIANTS[name])).resumed == 3
    resumed = checkpoint.load(last)
    assert resumed.modules.keys() == straight.modules.keys()
    assert all(equal(dict(resumed.modules[part]), dict(straight.modules[part])) for part in straight.modules)
    assert equal(dict(resumed.extra), dict(straight.extra))


def test_noise_is_really_drawn(straight, tmp_path):
    train(recipe(tmp_path, {"model": {"quantizer": {"temperature": 1e-6}}}))
    assert not equal(weights(straight.out, 6), weights(tmp_path, 6))


def test_accumulated_batches_give_the_weights_of_the_whole(tmp_path):
    plain = {"model": {"quantizer": {"name": "fsq", "levels": [4, 4, 4]}}}
    train(recipe(tmp_path / "whole", plain))
    train(recipe(tmp_path / "parts", {**plain, "train": {"batch": 1}}))
    whole, parts = (weights(tmp_path / name, 6) for name in ("whole", "parts"))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-5)


def test_log_has_a_row_per_interval_with_speed_and_waiting(straight):
    rows = log.read(straight.out / log.METRICS)
    assert [row["step"] for row in rows] == [2, 4, 6]
    wanted = {"loss", "loss/mse", "loss/quantizer", "lr", "grad_norm", "images_per_s", "data_wait", "skipped_steps"}
    assert wanted <= rows[0].keys()


def test_checkpoint_names_recipe_versions_and_commit(straight):
    state = json.loads((checkpoint.folders(straight.out)[-1] / checkpoint.STATE).read_text())
    assert (
        state["versions"]["torch"] == torch.__version__.split("+")[0] or state["versions"]["torch"] in torch.__version__
    )
    assert "git" in state and state["step"] == 6
    stored = load(checkpoint.folders(straight.out)[-1] / checkpoint.RECIPE)
    assert stored.resolved() == recipe(straight.out).resolved()


def test_result_is_loadable_and_holds_the_averages(straight):
    tokenizer = vistok.load(str(straight.out / "tokenizer"))
    averages = weights(straight.out, 6, "ema")
    assert all(torch.equal(p, averages[n]) for n, p in tokenizer.named_parameters())


def test_every_file_is_named_at_the_end(straight, capsys):
    train(recipe(straight.out))
    said = capsys.readouterr().out
    assert all(
        str(straight.out / name) in said for name in ("tokenizer", "metrics.jsonl", "recipe.yaml", "checkpoints")
    )


def test_finished_run_trains_no_further(straight):
    before = weights(straight.out, 6)
    assert train(recipe(straight.out)).seconds == straight.seconds
    assert equal(before, weights(straight.out, 6))


def test_changed_recipe_in_the_same_folder_is_refused(straight):
    with pytest.raises(ConfigError, match=r"another recipe\. optim\.lr: was 0\.001, is 0\.002.*train\.resume=anyway"):
        train(recipe(straight.out, {"optim": {"lr": 2e-3}}))


def test_checkpoint_of_another_model_is_refused_even_anyway(straight):
    with pytest.raises(LoadError, match=r"checkpoint of step 6 in .* does not fit TiTok: .*wrong shape"):
        train(recipe(straight.out, {"model": {"num_tokens": 4}, "train": {"resume": "anyway"}}))


def test_checkpoint_without_a_discriminator_is_refused(straight):
    over = {"losses": {"adversarial": {"weight": 0.1}}, "train": {"step": GAN, "resume": "anyway"}}
    with pytest.raises(ConfigError, match="has no discriminator. Start anew"):
        train(recipe(straight.out, over))


def test_used_folder_is_refused_when_resume_is_never(straight):
    with pytest.raises(ConfigError, match=r"step_000000006 already and train\.resume is never"):
        train(recipe(straight.out, {"train": {"resume": "never"}}))


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    train(recipe(tmp_path, {"train": {"log_every": 1}}))
    os.rename(checkpoint.folders(tmp_path)[-1], tmp_path / "gone")
    train(recipe(tmp_path, {"train": {"log_every": 1}}))
    assert [row["step"] for row in log.read(tmp_path / log.METRICS)] == [1, 2, 3, 4, 5, 6]


def test_time_limit_ends_the_run_and_saves(tmp_path):
    result = train(recipe(tmp_path, {"train": {"steps": 100_000, "max_seconds": 1.0}, "optim": {"warmup": 0}}))
    assert result.stopped == "time" and 0 < result.step < 100_000
    assert (tmp_path / "tokenizer" / "config.json").is_file()
    assert log.read(tmp_path / log.METRICS)[-1]["lr"] < 1e-3


def test_signal_saves_and_says_how_to_go_on(tmp_path, step, capsys):
    class Interrupted(After):
        def act(self):
            os.kill(os.getpid(), signal.SIGINT)

    result = train(recipe(tmp_path, {"train": {"step": {"name": step(Interrupted)}}}))
    assert (result.stopped, result.step) == ("signal", 3)
    assert "SIGINT: stopped after step 3 and saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(recipe(tmp_path, {"train": {"steps": 1}}))))
    thread.start()
    thread.join()
    assert results[0].step == 1


class Poisoned(Reconstruct):
    """The loss of some steps is not a number."""

    bad = (2,)

    def run(self, batch, step, generator):
        for part in super().run(batch, step, generator):
            if step in self.bad:
                object.__setattr__(part, "loss", part.loss * float("nan"))
            yield part


def test_bad_step_is_skipped_counted_and_named(tmp_path, step):
    kind = step(type("PoisonedOnce", (Poisoned,), {}))
    with pytest.warns(UserWarning, match="Step 2 is skipped: loss total is nan"):
        train(recipe(tmp_path, {"train": {"step": {"name": kind}, "log_every": 1}}))
    rows = log.read(tmp_path / log.METRICS)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert "loss" not in rows[2]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path, 6).values())


def test_bad_steps_in_a_row_end_the_run_and_keep_the_checkpoint(tmp_path, step):
    kind = step(type("PoisonedLate", (Poisoned,), {"bad": range(3, 99)}))
    over = {"train": {"step": {"name": kind}, "max_bad_steps": 2}}
    with warnings.catch_warnings(action="ignore"), pytest.raises(Diverged, match="2 steps in a row up to step 4.*nan"):
        train(recipe(tmp_path, over))
    assert checkpoint.newest(tmp_path).step == 3


def test_bad_step_leaves_running_statistics_alone(tmp_path, step):
    class Spoiler(Poisoned):
        def setup(self, model, losses):
            super().setup(model, losses)
            model.register_buffer("running", torch.zeros(2))

        def run(self, batch, step, generator):
            self.trained["model"].running += float("nan") if step in self.bad else 1.0
            yield from super().run(batch, step, generator)

    with warnings.catch_warnings(action="ignore"):
        train(recipe(tmp_path, {"train": {"step": {"name": step(Spoiler)}}}))
    assert weights(tmp_path, 6)["running"].tolist() == [5.0, 5.0]


def test_frozen_parameters_stay(tmp_path):
    train(recipe(tmp_path, {"train": {"freeze": ["encoder.*", "quantizer.*"], "steps": 2, "save_every": 1}}))
    first, second = weights(tmp_path, 1), weights(tmp_path, 2)
    moved = {k.split(".")[0] for k in first if not torch.equal(first[k], second[k])}
    assert moved == {"decoder", "head"}


def test_init_from_starts_at_the_given_weights(straight, tmp_path):
    over = {"train": {"init_from": str(straight.out / "tokenizer"), "steps": 1, "freeze": ["encoder.*"]}}
    train(recipe(tmp_path, over))
    found, given = weights(tmp_path, 1), weights(straight.out, 6, "ema")
    assert all(torch.equal(found[k], given[k]) for k in found if k.startswith("encoder."))


@pytest.mark.parametrize(
    ("freeze", "stand_still"),
    [((), set()), (("quantizer.*",), {"quantizer"}), (("encoder.*", "quantizer.*"), {"encoder", "quantizer"})],
    ids=["all", "frozen_quantizer", "decoder_only"],
)
def test_fine_tuning_on_a_folder_moves_what_is_not_frozen(tmp_path, photos, freeze, stand_still):
    for photo in photos[:3]:
        shutil.copy(photo, tmp_path)
    ema = {"name": "vq_ema", "codebook_size": 32, "dim": 4}  # its code book moves without a gradient
    model = {"model": {"quantizer": ema}}
    start = train(recipe(tmp_path / "start", {**model, "train": {"steps": 1}}))
    over = {"init_from": str(start.out / "tokenizer"), "freeze": list(freeze), "ema": 0.0}
    values = tiny_values(tmp_path / "tuned", {**model, "train": over})
    values["data"] = {"name": "folder", "path": str(tmp_path / "*.jpg")}
    train(from_dict(values))
    before, after = (vistok.load(str(out / "tokenizer")).state_dict() for out in (start.out, tmp_path / "tuned"))
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key.split(".")[0] for key in before} - stand_still


def test_bf16_trains(tmp_path):
    result = train(recipe(tmp_path, {"train": {"precision": "bf16", "steps": 2}}))
    row = log.read(tmp_path / log.METRICS)[-1]
    assert result.step == 2 and 0 < row["loss"] < 1
    assert all(w.dtype == torch.float32 for w in weights(tmp_path, 2).values())


def test_absent_tracker_is_one_warning(tmp_path):
    with pytest.warns(UserWarning, match="no_such_tracker is not installed") as seen:
        train(recipe(tmp_path, {"train": {"trackers": ["no_such_tracker"], "steps": 1}}))
    assert len(seen) == 1


def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(tmp_path, {"train": {"trackers": ["tensorboard"]}}))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 6]
