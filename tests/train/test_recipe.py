"""A recipe is checked to the last key before anything is built."""

from __future__ import annotations

import pytest

from tests.train.tiny import recipe, values
from vistok.config import ConfigError, write_yaml
from vistok.train.recipe import from_dict, load


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"trian": {}}, "trian: a recipe has no such section. Did you mean 'train'"),
        ({"train": {"stesp": 3}}, r"train\.stesp.*Did you mean .*'steps'"),
        ({"train": {"steps": "many"}}, r"train\.steps: expected int, got 'many'"),
        ({"train": {"steps": 0}}, r"train\.steps: expected at least 1, got 0"),
        ({"train": {"ema": 1.5}}, r"train\.ema: expected 0\.\.1, got 1\.5"),
        ({"train": {"step": {"name": "reconstrukt"}}}, r"train\.step\.name.*'reconstruct'"),
        ({"model": {"num_token": 3}}, r"model\.num_token.*'num_tokens'"),
        (
            {"model": {"quantizer": {"name": "vq_stochastic", "codebook": 8}}},
            r"model\.quantizer\.codebook.*codebook_size",
        ),
        ({"data": {"crops": "random"}}, r"data\.crops.*loader's keys: .*crop"),
        ({"data": {"crop": "rnadom"}}, r"data\.crop: .*random"),
        ({"data": {"scale": [0.5, 2.0]}}, r"data\.scale.*0\.5, 2\.0"),
        ({"losses": {"msee": {"weight": 1}}}, r"losses\.msee: no such loss.*'mse'"),
        ({"losses": {"mse": {"wieght": 1}}}, r"losses\.mse\.wieght"),
        ({"losses": {"hinge_gan": 1.0}}, r"losses\.hinge_gan: .*does not compare"),
        ({"losses": {"quantizer": {"beta": 1}}}, r"losses\.quantizer\.beta"),
        ({"optim": {"name": "adam"}}, r"optim\.name: no optimiser is called 'adam'.*'adamw'"),
        ({"optim": {"momentum": 0.9}}, r"optim\.momentum"),
        ({"optim": {"parts": {"critic": {"lr": 1.0}}}}, r"optim\.parts\.critic"),
        ({"eval": {"data": {"name": "photos"}, "metrics": ["psrn"]}}, r"eval\.metrics.*'psnr'"),
        ({"eval": {"data": {"name": "photo"}}}, r"eval\.data\.name.*'photos'"),
    ],
)
def test_what_does_not_fit_is_named_by_its_key(tmp_path, over, message):
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, over)


@pytest.mark.parametrize("section", ["model", "data", "optim", "train"])
def test_missing_section_is_named(tmp_path, section):
    given = values(tmp_path)
    del given[section]
    with pytest.raises(ConfigError, match=f"{section}: the recipe has no such section"):
        from_dict(given)


def test_all_open_values_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.split, train\.steps: no value yet.*data\.split=\.\.\."):
        recipe(tmp_path, {"data": {"split": "???"}, "train": {"steps": "???"}})


def test_resolved_recipe_gives_the_same_recipe_again(tmp_path):
    first = recipe(
        tmp_path, {"losses": {"l1": 0.5, "quantizer": {"weight": 2.0}}, "eval": {"data": {"name": "photos"}}}
    )
    assert from_dict(first.resolved()) == first


def test_resolved_recipe_survives_yaml(tmp_path):
    first = recipe(tmp_path)
    write_yaml(first.resolved(), tmp_path / "r.yaml")
    assert load(tmp_path / "r.yaml").resolved() == first.resolved()


def test_overrides_reach_every_section(tmp_path):
    write_yaml(values(tmp_path), tmp_path / "r.yaml")
    found = load(tmp_path / "r.yaml", ["train.steps=9", "data.crop=center", "model.quantizer.dim=6", "optim.lr=1e-5"])
    assert (found.train.steps, found.loader.crop, found.model["quantizer"]["dim"]) == (9, "center", 6)
    assert found.optims["model"].lr == 1e-5


def test_preset_model_is_resolved_to_its_builder(tmp_path):
    given = values(tmp_path)
    given["model"] = {"name": "titok_tiny", "num_tokens": 4}
    model = from_dict(given).model
    assert model["name"] == "titok" and model["num_tokens"] == 4 and "quantizer" in model


def test_one_loss_can_appear_twice_under_other_names(tmp_path):
    losses = recipe(
        tmp_path, {"losses": {"near": {"name": "mse", "weight": 2}, "late": {"name": "mse", "start": 5}}}
    ).losses
    assert losses["near"].spec == {"name": "mse"} and losses["late"].weighting.start == 5


def test_differences_name_only_what_changes_the_weights(tmp_path):
    first = recipe(tmp_path)
    other = recipe(tmp_path / "b", {"optim": {"lr": 2e-3}, "train": {"log_every": 7}, "data": {"workers": 1}})
    assert other.differences(first.resolved()) == ["optim.lr: was 0.001, is 0.002"]
