"""The registry: names, presets, what happens on a miss, plug-ins of third parties."""

from __future__ import annotations

import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import vistok
from vistok import registry as module
from vistok.registry import KINDS, Preset, Registry, Weights, nearest, register


class Plain:
    """A builder of the tests."""

    def __init__(self, *, width: int = 4) -> None:
        self.width = width


WEIGHTS = Weights(hub="org/name", licence_code="MIT", licence_weights="MIT, research only", trained_on="nothing")


@pytest.fixture
def table() -> Registry:
    """A filled registry of its own: two builders, one preset without and one with weights."""
    found = Registry("tokenizer", "nowhere_at_all")
    found.add_builder("titok", Plain)
    found.add_builder("maskgit", Plain)
    found.add_preset(Preset(kind="tokenizer", name="titok_tiny", builder="titok", config={"width": 2}))
    found.add_preset(
        Preset(kind="tokenizer", name="titok_s128.in1k", builder="titok", config={"width": 8}, weights=WEIGHTS)
    )
    return found


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes an importable package out of `name=source` files and returns its name."""
    counter = iter(range(100))

    def write(**files: str) -> str:
        name = f"vistok_test_package_{tmp_path.name.replace('-', '_')}_{next(counter)}"
        for filename, source in {"__init__": "", **files}.items():
            path = tmp_path / name / f"{filename.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    return write


def test_a_preset_resolves_to_its_builder(table: Registry) -> None:
    name, builder, preset = table.resolve("titok_s128.in1k")
    assert (name, builder, preset.config) == ("titok", Plain, {"width": 8})


def test_a_builder_resolves_without_a_preset(table: Registry) -> None:
    assert table.resolve("maskgit") == ("maskgit", Plain, None)


def test_names_match_a_shell_pattern(table: Registry) -> None:
    assert table.names("titok*") == ["titok", "titok_s128.in1k", "titok_tiny"]


def test_pretrained_names_are_presets_with_weights(table: Registry) -> None:
    assert table.names(pretrained=True) == ["titok_s128.in1k"]


def test_a_miss_names_the_nearest(table: Registry) -> None:
    with pytest.raises(KeyError, match=r"No tokenizer named 'titok_s18.in1k'. Did you mean 'titok_s128.in1k'"):
        table.resolve("titok_s18.in1k")


def test_a_wild_miss_lists_what_there_is(table: Registry) -> None:
    with pytest.raises(KeyError, match=r"Known: maskgit, titok, titok_s128.in1k, titok_tiny\."):
        table.resolve("qqq")


@pytest.mark.parametrize("name", ["titok", "titok_tiny"])
def test_a_taken_name_is_refused_with_its_owner(table: Registry, name: str) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer '{name}' .* already registered by .*(Plain|preset of 'titok')"):
        table.add_builder(name, Plain)


def test_a_preset_without_its_builder_says_which_is_missing(table: Registry) -> None:
    table.add_preset(Preset(kind="tokenizer", name="lost_b", builder="lost", config={}))
    with pytest.raises(KeyError, match="preset 'lost_b' needs the builder 'lost', which is missing"):
        table.resolve("lost_b")


def test_a_broken_module_is_named_and_the_rest_works(package: Callable[..., str]) -> None:
    name = package(a_good="VALUE = 1", b_broken="import does_not_exist_anywhere", c_good="VALUE = 2")
    table = Registry("tokenizer", name)
    with pytest.warns(UserWarning, match=rf"could not import {name}.b_broken.*does_not_exist_anywhere"):
        table.fill()
    assert (sys.modules[f"{name}.a_good"].VALUE, sys.modules[f"{name}.c_good"].VALUE) == (1, 2)
    with pytest.raises(KeyError, match=rf"Not importable: {name}.b_broken \(ModuleNotFoundError"):
        table.resolve("anything")


def test_a_broken_package_inside_the_folder_is_named_and_the_rest_works(package: Callable[..., str]) -> None:
    name = package(inner__in____init__="raise RuntimeError('boom')", z_good="VALUE = 1")
    table = Registry("tokenizer", name)
    with pytest.warns(UserWarning, match="inner, so what it registers is missing: boom"):
        table.fill()
    assert list(table.broken) == [f"{name}.inner"]
    assert f"{name}.z_good" in sys.modules


def test_modules_of_inner_packages_are_imported(package: Callable[..., str]) -> None:
    name = package(inner__in____init__="", inner__in__deep="VALUE = 3")
    Registry("tokenizer", name).fill()
    assert sys.modules[f"{name}.inner.deep"].VALUE == 3


@pytest.mark.parametrize("folder", ["no_such_package", "no_such_package.inner.most"])
def test_a_room_that_does_not_exist_yet_is_empty(folder: str) -> None:
    assert Registry("method", folder).names() == []


def test_a_second_thread_waits_for_full_tables(package: Callable[..., str]) -> None:
    name = package(
        slow="""
        import time
        time.sleep(0.2)
        from tests import test_registry
        test_registry.SHARED["table"].add_builder("slow", test_registry.Plain)
        """
    )
    table = SHARED["table"] = Registry("tokenizer", name)
    seen: list[list[str]] = []
    threads = [threading.Thread(target=lambda: seen.append(table.names())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["slow"], ["slow"]]


SHARED: dict[str, Registry] = {}


def test_nearest_is_silent_on_request_if_nothing_comes_close() -> None:
    assert nearest("qqq", ["titok"], listing=False) == ""


def test_nearest_shortens_long_lists() -> None:
    assert nearest("qqq", [f"name{i:02d}" for i in range(40)]).endswith("name11, ... (40 in all).")


def test_every_kind_can_be_listed() -> None:
    assert {kind: isinstance(vistok.list(kind), list) for kind in KINDS} == dict.fromkeys(KINDS, True)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(KeyError, match="No registry kind named 'tokeniser'. Did you mean 'tokenizer'"):
        vistok.list("tokeniser")


@pytest.mark.usefixtures("scratch_registry")
def test_info_shows_builder_config_and_weights() -> None:
    register("generator", "toy")(Plain)
    module.preset("generator", "toy_s.in1k", builder="toy", config={"width": 3}, weights=WEIGHTS)
    found = vistok.info("toy_s.in1k")
    assert (found.kind, found.builder, found.config) == ("generator", "toy", {"width": 3})
    assert (found.summary, found.weights) == ("A builder of the tests.", WEIGHTS)


@pytest.mark.usefixtures("scratch_registry")
def test_changing_what_info_returns_does_not_change_the_preset() -> None:
    register("generator", "toy")(Plain)
    module.preset("generator", "toy_s", builder="toy", config={"nested": {"width": 3}})
    vistok.info("toy_s").config["nested"]["width"] = 9
    assert vistok.info("toy_s").config == {"nested": {"width": 3}}


@pytest.mark.usefixtures("scratch_registry")
def test_info_asks_for_the_kind_of_an_ambiguous_name() -> None:
    register("generator", "toy")(Plain)
    register("loss", "toy")(Plain)
    with pytest.raises(KeyError, match="registered as generator and loss: say which, e.g. kind='generator'"):
        vistok.info("toy")
    assert vistok.info("toy", kind="loss").kind == "loss"


def test_info_of_an_unknown_name_says_so() -> None:
    with pytest.raises(KeyError, match="No quantizer named 'no_such_thing_at_all' is registered"):
        vistok.info("no_such_thing_at_all", kind="quantizer")


def _distribution(folder: Path, name: str, source: str, points: dict[str, str]) -> None:
    """An installed distribution, as far as `importlib.metadata` can tell."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vistok.plugins]", *lines, ""]))


PLUGIN = """
    from vistok.registry import register

    @register("quantizer", "plugged_in")
    class Plugged:
        def __init__(self, *, width: int = 4) -> None:
            self.width = width
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch_registry: None) -> Path:
    """A folder on the import path whose distributions are looked for again."""
    vistok.list()  # everything of ours first
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "_entry_points_loaded", False)
    monkeypatch.setattr(module, "broken_plugins", {})
    monkeypatch.setattr(module.registry("quantizer"), "_filled", False)
    return tmp_path


def test_an_installed_plugin_registers_itself(plugins: Path) -> None:
    _distribution(plugins, "vistok_fake_good", PLUGIN, {"good": "vistok_fake_good"})
    assert vistok.create("quantizer", "plugged_in", width=7).width == 7


def test_a_broken_plugin_is_named_and_the_others_work(plugins: Path) -> None:
    _distribution(plugins, "vistok_fake_bad", "raise RuntimeError('boom')", {"bad": "vistok_fake_bad"})
    _distribution(plugins, "vistok_fake_fine", PLUGIN, {"fine": "vistok_fake_fine"})
    with pytest.warns(UserWarning, match=r"plug-in 'bad' \(vistok_fake_bad\) could not be loaded: boom"):
        assert "plugged_in" in vistok.list("quantizer")
    with pytest.raises(KeyError, match=r"Not importable: .*plug-in bad \(RuntimeError: boom\)"):
        vistok.create("quantizer", "no_such_thing_at_all")


def test_a_plugin_that_exits_is_named_and_the_others_work(plugins: Path) -> None:
    _distribution(plugins, "vistok_fake_exit", "raise SystemExit(3)", {"exit": "vistok_fake_exit"})
    _distribution(plugins, "vistok_fake_well", PLUGIN, {"well": "vistok_fake_well"})
    with pytest.warns(UserWarning, match=r"plug-in 'exit' \(vistok_fake_exit\) could not be loaded: 3"):
        assert "plugged_in" in vistok.list("quantizer")


def test_a_plugin_cannot_take_a_name_of_ours(plugins: Path) -> None:
    register("quantizer", "ours")(Plain)
    source = PLUGIN.replace("plugged_in", "ours")
    _distribution(plugins, "vistok_fake_thief", source, {"thief": "vistok_fake_thief"})
    with pytest.warns(UserWarning, match=f"'ours' .*is already registered by {__name__}.Plain"):
        vistok.list("quantizer")
