"""What cannot work is refused in one clear sentence, before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.plugins import hosts
from vistok.config import ConfigError
from vistok.plugins.attach import attach


@pytest.fixture(scope="module")
def llava() -> Any:
    return hosts.llava()


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"keep": 0}, ValueError, "at least 1"),
        ({"keep": 1.5}, ValueError, "share"),
        ({"kepp": 2}, ConfigError, "Did you mean 'keep'"),
        ({"layers": [6]}, ValueError, "layers 1..5"),
        ({"layers": [0]}, ValueError, "features stage"),
        ({"layers": [1, 3]}, ValueError, "one ratio per layer"),
        ({"ratios": [1.5]}, ValueError, r"\(0, 1\]"),
    ],
)
def test_settings_that_mean_nothing_are_refused(llava, config, error, match):
    names = set(vars(llava))
    with pytest.raises(error, match=match):
        attach(llava, "fastv", **config)
    assert set(vars(llava)) == names


def test_an_unknown_method_gets_a_suggestion(llava):
    with pytest.raises(KeyError, match="fastv"):
        attach(llava, "fastvv")


def test_plugins_do_not_nest(llava):
    with attach(llava, "fastv"), pytest.raises(ValueError, match="do not nest"):
        attach(llava, "random")


def test_a_built_method_takes_no_settings(llava):
    from vistok.compress.methods.fastv import FastV

    with pytest.raises(ValueError, match="too late"):
        attach(llava, FastV(), keep=3)


def test_a_setting_can_live_in_a_yaml_file(llava, tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text("name: fastv\nlayers: [3]\nkeep: {mean: 10}\n")
    with attach(llava, str(file), reference=True) as plugin:
        hosts.generate(llava, hosts.llava_inputs((1,)), steps=1)
        assert plugin.trace.image == [[16]] * 3 + [[4]] * 3
        assert plugin.method.reference


def test_sliding_windows_are_warned_about():
    model = hosts.llava()
    model.model.language_model.layers[3].self_attn.sliding_window = 8
    with pytest.warns(UserWarning, match="window counts the tokens that are left"):
        attach(model, "random").detach()


def test_a_mapping_needs_a_name(llava):
    with pytest.raises(ValueError, match="needs its name"):
        attach(llava, {"keep": 3})


def test_an_unknown_model_is_told_what_an_adapter_supplies():
    with pytest.raises(TypeError, match=r"five things: \(1\) text_model.*\(5\) blocks.*@vistok.registry.register"):
        attach(torch.nn.Linear(2, 2), "fastv")


@pytest.mark.parametrize("where", ["call", "config"])
def test_chunked_prefill_is_refused(llava, where):
    inputs = hosts.llava_inputs((1,))
    if where == "call":
        with attach(llava, "fastv"), pytest.raises(ValueError, match="Chunked prefill"):
            hosts.generate(llava, inputs, prefill_chunk_size=4)
        return
    llava.generation_config.prefill_chunk_size = 4
    try:
        with pytest.raises(ValueError, match="prefill_chunk_size=4"):
            attach(llava, "fastv")
    finally:
        llava.generation_config.prefill_chunk_size = None


def test_too_few_placeholders_are_named(llava):
    inputs = hosts.llava_inputs((1, 1))
    inputs["input_ids"][1][inputs["input_ids"][1] == hosts.IMAGE] = 5
    with attach(llava, "fastv"), pytest.raises(ValueError, match="Sample 1, image 0: expected 16 .* got 0"):
        hosts.generate(llava, inputs)


def test_too_many_placeholders_are_named(llava):
    inputs = hosts.llava_inputs((1,))
    inputs["input_ids"][0, :2] = hosts.IMAGE
    with attach(llava, "fastv"), pytest.raises(ValueError, match="Sample 0, image 1: expected no more .* got 2"):
        hosts.generate(llava, inputs)


def test_there_is_no_trace_before_a_call(llava):
    with attach(llava, "fastv") as plugin, pytest.raises(RuntimeError, match="no trace yet"):
        _ = plugin.trace
