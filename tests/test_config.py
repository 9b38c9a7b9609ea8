"""Checked configuration: what is accepted, converted, refused, and what the messages say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from torch import nn

import vistok
from vistok.config import (
    ConfigError,
    Of,
    Spec,
    check_component,
    check_value,
    describe,
    merge,
    plain,
    read_yaml,
    write_yaml,
)
from vistok.registry import preset, register


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A nested dataclass."""

    warmup: int
    shape: Literal["cosine", "flat"] = "cosine"


class Part:
    """A nested component."""

    def __init__(self, *, dim: int, scale: float = 1.0) -> None:
        self.dim, self.scale = dim, scale


class Other:
    """Another component of the same kind."""

    def __init__(self, *, levels: tuple[int, ...]) -> None:
        self.levels = levels


class Whole:
    """A component with a nested one."""

    def __init__(
        self,
        *,
        quantizer: Annotated[Spec, Of("quantizer")],
        width: int = 8,
        extra: Annotated[Spec | None, Of("quantizer")] = None,
        several: list[Annotated[Spec, Of("quantizer")]] | None = None,
        mode: Literal["fast", "slow"] = "fast",
    ) -> None:
        self.quantizer = quantizer
        self.width, self.extra, self.several, self.mode = width, extra, several, mode


class Loose:
    """A builder that hides its keywords, which is not allowed."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs


@pytest.fixture
def whole(scratch_registry: None) -> None:
    """Registers the classes above."""
    register("quantizer", "test_part")(Part)
    register("quantizer", "test_other")(Other)
    register("tokenizer", "test_whole")(Whole)
    register("tokenizer", "test_loose")(Loose)
    nested = {"name": "test_part", "dim": 3, "scale": 2.0}
    preset("tokenizer", "test_whole_s", builder="test_whole", config={"quantizer": nested, "width": 16})
    preset("quantizer", "test_part_wide", builder="test_part", config={"dim": 64})


def make(**config: Any) -> Whole:
    return vistok.create("tokenizer", "test_whole", **{"quantizer": {"name": "test_part", "dim": 3}, **config})


@pytest.mark.usefixtures("whole")
class TestCreate:
    def test_a_nested_component_is_checked_and_converted(self) -> None:
        assert make(quantizer={"name": "test_part", "dim": 3, "scale": 2}).quantizer == {
            "name": "test_part",
            "dim": 3,
            "scale": 2.0,
        }

    def test_a_nested_preset_becomes_builder_and_config(self) -> None:
        assert make(quantizer={"name": "test_part_wide"}).quantizer == {"name": "test_part", "dim": 64}

    def test_an_unknown_key_names_its_nearest(self) -> None:
        with pytest.raises(ConfigError, match="^widht: tokenizer 'test_whole' has no such key. Did you mean 'width'"):
            make(widht=3)

    def test_an_unknown_nested_key_is_dotted(self) -> None:
        with pytest.raises(
            ConfigError, match="^quantizer.dmi: quantizer 'test_part' has no such key. Did you mean 'dim'"
        ):
            make(quantizer={"name": "test_part", "dmi": 3})

    def test_a_missing_nested_key_says_its_type(self) -> None:
        with pytest.raises(ConfigError, match=r"^quantizer.dim: quantizer 'test_part' needs this key \(int\)"):
            make(quantizer={"name": "test_part"})

    def test_a_wrong_nested_type_shows_the_value(self) -> None:
        with pytest.raises(ConfigError, match=r"^quantizer.dim: expected int, got 'three' \(str\)"):
            make(quantizer={"name": "test_part", "dim": "three"})

    def test_an_unknown_nested_name_is_dotted(self) -> None:
        with pytest.raises(
            ConfigError, match="^quantizer.name: No quantizer named 'test_prat'. Did you mean 'test_part'"
        ):
            make(quantizer={"name": "test_prat"})

    @pytest.mark.parametrize("spec", ["test_part", {"dim": 3}, 4, None, {"name": 3}])
    def test_a_component_without_a_name_is_refused(self, spec: Any) -> None:
        with pytest.raises(ConfigError, match=r"^quantizer: expected \{name: <a quantizer>, ...\}, got"):
            make(quantizer=spec)

    def test_an_optional_component_may_be_null(self) -> None:
        assert make(extra=None).extra is None

    def test_an_optional_component_is_checked_if_given(self) -> None:
        with pytest.raises(ConfigError, match=r"^extra.dim: expected int"):
            make(extra={"name": "test_part", "dim": 1.5})

    def test_components_in_a_list_carry_their_index(self) -> None:
        with pytest.raises(ConfigError, match=r"^several\[1\].dim: expected int"):
            make(several=[{"name": "test_part", "dim": 1}, {"name": "test_part", "dim": "x"}])

    def test_a_value_left_open_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"^quantizer.dim: this value is left open \(\?\?\?\); give int"):
            make(quantizer={"name": "test_part", "dim": "???"})

    def test_a_value_left_open_is_refused_even_if_the_builder_has_a_default(self) -> None:
        with pytest.raises(ConfigError, match="^width: this value is left open"):
            make(width="???")

    def test_an_unknown_top_level_name_is_a_key_error(self) -> None:
        with pytest.raises(KeyError, match="Did you mean 'test_whole'"):
            vistok.create("tokenizer", "test_wole")

    def test_keywords_override_a_preset_key_by_key(self) -> None:
        built = vistok.create("tokenizer", "test_whole_s", quantizer={"dim": 5})
        assert (built.width, built.quantizer) == (16, {"name": "test_part", "dim": 5, "scale": 2.0})

    def test_another_component_replaces_that_of_a_preset_as_a_whole(self) -> None:
        built = vistok.create("tokenizer", "test_whole_s", quantizer={"name": "test_other", "levels": [8, 8]})
        assert built.quantizer == {"name": "test_other", "levels": (8, 8)}

    def test_building_a_preset_leaves_it_unchanged(self) -> None:
        vistok.create("tokenizer", "test_whole_s").quantizer["dim"] = 99
        assert vistok.info("test_whole_s").config["quantizer"]["dim"] == 3

    def test_a_builder_that_hides_its_keywords_is_refused(self) -> None:
        with pytest.raises(TypeError, match="spells out its keywords"):
            vistok.create("tokenizer", "test_loose", anything=1)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, float, 3.0),
        (3, int | float, 3),
        (3.5, int | float, 3.5),
        (True, bool, True),
        (None, int | None, None),
        ("auto", Literal["auto"] | int, "auto"),
        (4, Literal["auto"] | int, 4),
        ([1, 2], tuple[int, int], (1, 2)),
        ((1, 2, 3), list[int], [1, 2, 3]),
        ([1, 2], Sequence[float], (1.0, 2.0)),
        ([1, "a"], tuple, (1, "a")),
        ([], list[int], []),
        ({"a": 1}, Mapping[str, float], {"a": 1.0}),
        ({3: "x"}, dict[str, str], {"3": "x"}),
        ("a/b", Path, Path("a/b")),
        ("a/b", str | Path, "a/b"),
        ({"warmup": 3}, Schedule, Schedule(warmup=3)),
        ({"warmup": 3}, Schedule | None, Schedule(warmup=3)),
        (Schedule(warmup=1), Schedule, Schedule(warmup=1)),
        (object, Any, object),
        (3, Annotated[int, "a remark"], 3),
    ],
)
def test_a_fitting_value_is_taken(value: Any, annotation: Any, expected: Any) -> None:
    found = check_value(value, annotation, "k")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (True, int, r"k: expected int, got True \(bool\)"),
        (1, bool, "k: expected bool, got 1"),
        (True, float, "k: expected float, got True"),
        (True, int | float, "k: expected int or float, got True"),
        (3.0, int, "k: expected int, got 3.0"),
        ("3", int, "k: expected int, got '3'"),
        (3, str, "k: expected str, got 3"),
        (None, int, "k: expected int, got None"),
        ("fats", Literal["fast", "slow"], "k: expected one of fast, slow, got 'fats'. Did you mean 'fast'"),
        (True, Literal[1, 2], "k: expected one of 1, 2, got True"),
        (1.0, Literal[1, 2], "k: expected one of 1, 2, got 1.0"),
        ("ab", list[str], "k: expected a list of str, got 'ab'"),
        ("ab", Sequence, "k: expected .*, got 'ab'"),
        ([1, "b"], list[int], r"k\[1\]: expected int, got 'b'"),
        ([1, 2, 3], tuple[int, int], r"k: expected 2 values, got 3 \(\[1, 2, 3\]\)"),
        (5, tuple[int, int], r"k: expected a list of 2 values \(int, int\), got 5"),
        ({"a": "x"}, dict[str, float], "k.a: expected float, got 'x'"),
        ([1], dict[str, float], "k: expected a mapping"),
        (3, Schedule, "k: expected a mapping with warmup, shape, got 3"),
        ({"warmup": 3, "shpe": 1}, Schedule, "k.shpe: 'k' has no such key. Did you mean 'shape'"),
        ({"warmup": "x"}, Schedule | None, "k.warmup: expected int"),
        ({"warmup": "x"}, Schedule | int, "k.warmup: expected int"),
        ({}, Schedule, r"k.warmup: 'k' needs this key \(int\)"),
        (["???"], list[str], r"k\[0\]: this value is left open"),
        ({3: 1}, Schedule, "k.3: 'k' has no such key"),
        ("???", Any, "k: this value is left open"),
    ],
)
def test_a_wrong_value_is_refused_by_its_dotted_key(value: Any, annotation: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + message):
        check_value(value, annotation, "k")


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "int or null"),
        (Literal["a", "b"], "one of a, b"),
        (list[float], "a list of float"),
        (dict[str, int], "a mapping"),
        (Annotated[Spec, Of("loss")], "{name: <a loss>, ...}"),
    ],
)
def test_annotations_are_described_in_words(annotation: Any, words: str) -> None:
    assert describe(annotation) == words


def test_merge_keeps_what_is_not_overridden_and_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(base, {"a": {"b": 9}}) == {"a": {"b": 9, "c": 2}, "d": 3}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


RECIPE = """
model: {name: titok, quantizer: {name: vq, dim: 8, beta: 0.25}}
optim: {lr: 1e-4, betas: [0.9, 0.99], warmup: 10_000}
train: {steps: 100, root: "???", double: "${train.steps}"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_numbers_in_a_recipe_are_numbers(recipe: Path) -> None:
    assert read_yaml(recipe)["optim"] == {"lr": 0.0001, "betas": [0.9, 0.99], "warmup": 10000}


@pytest.mark.parametrize(
    ("override", "keys", "expected"),
    [
        ("train.steps=7", ("train", "steps"), 7),
        ("train.root=/data/x=y", ("train", "root"), "/data/x=y"),
        ("optim.lr=2e-4", ("optim", "lr"), 0.0002),
        ("optim.betas=[0.5, 0.6]", ("optim", "betas"), [0.5, 0.6]),
        ("optim.betas[1]=0.5", ("optim", "betas"), [0.9, 0.5]),
        ("train.flag=true", ("train", "flag"), True),
        ("train.steps=null", ("train", "steps"), None),
        ("train.name=", ("train", "name"), None),
        ("model.quantizer.dim=4", ("model", "quantizer"), {"name": "vq", "dim": 4, "beta": 0.25}),
        (
            "model.quantizer={name: fsq, levels: [8, 8]}",
            ("model", "quantizer"),
            {"name": "fsq", "levels": [8, 8]},
        ),
    ],
)
def test_an_override_sets_exactly_its_key(recipe: Path, override: str, keys: tuple[str, str], expected: Any) -> None:
    assert read_yaml(recipe, [override])[keys[0]][keys[1]] == expected


def test_interpolations_see_the_overrides(recipe: Path) -> None:
    assert read_yaml(recipe, ["train.steps=7"])["train"]["double"] == 7


def test_a_value_left_open_stays_marked(recipe: Path) -> None:
    assert read_yaml(recipe)["train"]["root"] == "???"


@pytest.mark.parametrize("override", ["train.steps", "--steps=3", "=3"])
def test_what_is_not_an_override_is_refused(recipe: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not an override. Write key.sub=value"):
        read_yaml(recipe, [override])


@pytest.mark.parametrize("override", ["train.steps=[1,", "optim.betas[x]=3", "optim.betas[9]=3"])
def test_an_override_that_cannot_be_applied_is_one_clear_line(recipe: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="cannot be applied") as caught:
        read_yaml(recipe, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1, 2", r"is not a YAML file: .*\(line 2, column 1\)"),
        ("a: 1\na: 2", "is not a YAML file: found duplicate key a"),
        ("- 1\n- 2", "expected a mapping"),
        ("a: ${b.c}", "Interpolation key 'b.c' not found"),
        ("\x00\x01", "is not a YAML file"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_names_the_nearest_file(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no recipe '.*/recipes.yaml'. Did you mean 'recipe.yaml'"):
        read_yaml(recipe.parent / "recipes.yaml")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    value = {"schedule": Schedule(warmup=3), "size": (2, 3), "root": Path("a/b"), "lr": 1e-4, "none": None}
    write_yaml(value, tmp_path / "snapshot.yaml")
    assert read_yaml(tmp_path / "snapshot.yaml") == plain(value)


def test_module_without_a_constructor_takes_nothing_even_after_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.compile puts a wrapper of its own module in the place of `Module.__init__`
    plain = nn.Module.__init__

    def patched_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__init__", patched_init)
    assert check_component("loss", {"name": "mse"}, "losses.mse") == {"name": "mse"}
