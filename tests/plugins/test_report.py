"""Figures of a call: FLOPs as counted, cache bytes as stored, pictures painted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.plugins import hosts, zoo
from vistok.compress.budget import Budget
from vistok.plugins.attach import attach


@pytest.fixture(scope="module")
def llava() -> Any:
    return hosts.llava()


@pytest.fixture(scope="module")
def eager() -> Any:  # the counter does not know the fast attention of CPUs
    return hosts.llava("eager")


@pytest.mark.parametrize("keep", [1.0, 0.25])
@pytest.mark.parametrize("name", ["random", "pool"])
def test_flops_in_closed_form_are_those_of_a_counted_run(eager, name, keep):
    layers = eager.model.language_model.layers
    with attach(eager, name, keep=keep) as plugin, FlopCounterMode(display=False) as counter:
        eager(**hosts.llava_inputs((1,)), use_cache=True)
    counts = counter.get_flop_counts()
    per_layer = [sum(counts[n].values()) for n in counts if n.rsplit(".", 1)[0].endswith("language_model.layers")]
    assert len(per_layer) == len(layers)
    assert sum(per_layer) == sum(plugin.report().flops)


def test_attention_rows_cost_a_small_share_of_the_prefill(eager):
    inputs = hosts.llava_inputs((1,))

    def counted(name: str) -> int:
        with attach(eager, name, keep=0.5), FlopCounterMode(display=False) as counter:
            eager(**inputs, use_cache=True)
        return counter.get_total_flops()

    assert counted("random") < counted("fastv") < 1.02 * counted("random")


def test_cache_bytes_are_those_of_the_cache(llava):
    inputs = hosts.llava_inputs((1,))
    with attach(llava, "snapkv", keep=4) as plugin:
        out = hosts.generate(llava, inputs, steps=3)
        report = plugin.report()
    stored = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in out.past_key_values.layers)
    assert report.cache_bytes == [stored]
    assert report.cache_bytes_without[0] > stored
    assert "snapkv" in str(report) and "cache bytes" in str(report)


def test_a_budget_is_met_in_the_real_trace(llava):
    inputs = hosts.llava_inputs((1, 2))
    with attach(llava, "fastv", keep=Budget(mean=8), layers=[2]) as plugin:
        hosts.generate(llava, inputs, steps=1)
        found = plugin.trace.budget(plugin.runtime.host)
    assert found["mean"] == [8, 16]  # per image
    assert found["count"] == [4, 8] and found["ratio"] == [0.25, 0.25]
    assert 0.4 < found["flops"][0] < 0.5


def test_dropped_tokens_are_dark_and_kept_ones_as_they_are(llava):
    inputs = hosts.llava_inputs((1, 2))
    image = torch.ones(3, 56, 56)
    with attach(llava, "fastv", keep=5) as plugin:
        hosts.generate(llava, inputs, steps=1)
        shown = np.asarray(plugin.show(image, sample=1, number=1))
        last = plugin.runtime.last.columns_at(5)
    cells = shown[7::14, 7::14, 0].reshape(-1)
    kept = last.place[1][last.segment[1] == 1]
    assert shown.shape == (56, 56, 3)
    assert set(np.flatnonzero(cells == 255)) == set(kept.tolist())
    assert (np.delete(cells, kept.numpy()) == 64).all()


@pytest.mark.parametrize("name", ["pool", "mustdrop"])
def test_merged_tokens_share_a_colour(llava, name):
    config = {"pool": {"keep": 4}, "mustdrop": {"similarity": -1.0, "keep": 8}}[name]
    with attach(llava, name, **config) as plugin:
        hosts.generate(llava, hosts.llava_inputs((1,)), steps=1)
        shown = np.asarray(plugin.show(torch.full((3, 56, 56), 0.5)))
    cells = shown[7::14, 7::14].reshape(-1, 3)
    colours = np.unique(cells, axis=0)
    assert len(colours) == {"pool": 4, "mustdrop": 2}[name]


def test_a_mosaic_is_painted_without_its_newlines():
    found = zoo.HOSTS["llava_next"]()
    with attach(found.model, "fastv", keep=0.3) as plugin:
        hosts.generate(found.model, found.prompt([(1, [("image", 2)])]), steps=1)
        assert plugin.show(torch.rand(3, 112, 56)).size == (56, 112)


def test_showing_what_is_not_there_is_refused(llava):
    with attach(llava, "fastv") as plugin:
        with pytest.raises(RuntimeError, match="nothing to show"):
            plugin.show(torch.rand(3, 56, 56))
        hosts.generate(llava, hosts.llava_inputs((1,)), steps=1)
        with pytest.raises(ValueError, match="no picture 1 of sample 0"):
            plugin.show(torch.rand(3, 56, 56), number=1)
