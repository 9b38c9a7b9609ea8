"""Pictures made smaller before the tower, on every family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.plugins import hosts, zoo
from vistok.plugins.attach import attach
from vistok.plugins.families.base import Block
from vistok.plugins.families.llava_next import small_side

NAMES = list(zoo.HOSTS)
RAGGED: list[tuple[int, zoo.Sample]] = [(1, [("image", 2)]), (2, [("image", 1), ("image", 3)]), (3, [])]


@cache
def host(name: str) -> zoo.Host:
    return zoo.HOSTS[name]()


def samples(found: zoo.Host) -> list[tuple[int, zoo.Sample]]:
    return [*RAGGED, (5, [("video", 2), ("image", 4)])] if found.video else RAGGED


def logits_of(found: zoo.Host, inputs: dict[str, Any]) -> torch.Tensor:
    return hosts.logits(hosts.generate(found.model, inputs, steps=3))


@pytest.mark.parametrize("name", NAMES)
def test_full_size_is_the_untouched_model_and_batches_are_singles(name):
    found = host(name)
    batch = samples(found)
    inputs = found.prompt(batch)
    plain = logits_of(found, inputs)
    with attach(found.model, "downsample", keep=1.0):
        torch.testing.assert_close(logits_of(found, inputs), plain, atol=1e-5, rtol=0)
    for keep in (0.3, 3):
        with attach(found.model, "downsample", keep=keep) as plugin:
            together = logits_of(found, inputs)
            trace = plugin.trace
            for row, sample in enumerate(batch):
                alone = logits_of(found, found.prompt([sample]))
                torch.testing.assert_close(together[row], alone[0], atol=5e-5, rtol=0)
        assert [bool(n) for n in trace.image[0]] == [bool(sample) for _, sample in batch]
        for left, full in zip(trace.image[0], trace.images):
            newlines = 20 * len(full)  # at most: of rows that keep tokens
            assert left <= (3 * len(full) if keep == 3 else 0.3 * sum(full)) + newlines
            assert not full or left < sum(full)
    torch.testing.assert_close(logits_of(found, inputs), plain, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["internvl", "idefics3", "smolvlm"])
def test_tiles_equal_smaller_tiles_by_hand(name):
    found = host(name)
    inputs = found.prompt([(1, [("image", 2)])])
    small = F.interpolate(inputs["pixel_values"].view(-1, 3, 56, 56), (28, 28), mode="bicubic", antialias=True)
    pixels = small.view(*inputs["pixel_values"].shape[:-2], 28, 28)
    encoded = found.family.encode(found.model, {"pixel_values": pixels})["image"].pooler_output
    expected = torch.cat([f.reshape(-1, f.shape[-1]) for f in encoded])
    with attach(found.model, "downsample", keep=0.25) as plugin:
        prepared = plugin.prepare(inputs)
    features = prepared["mm_encoder_outputs"]["image"].pooler_output
    torch.testing.assert_close(torch.cat([f.reshape(-1, f.shape[-1]) for f in features]), expected)
    assert int((prepared["input_ids"] == hosts.IMAGE).sum()) == len(expected)


def test_a_mosaic_is_packed_like_a_full_one():
    found = host("llava_next")
    inputs = found.prompt([(1, [("image", 1)])])  # 100 x 50, in two crops
    with attach(found.model, "downsample", keep=0.25) as plugin:
        prepared = plugin.prepare(inputs)
    (features,) = prepared["mm_encoder_outputs"]["image"].pooler_output
    small = F.interpolate(inputs["pixel_values"][0], (28, 28), mode="bicubic", antialias=True)
    out = found.model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
    tokens = found.model.model.multi_modal_projector(out.hidden_states[-2][:, 1:])
    newline = found.model.model.image_newline
    mosaic = torch.cat([tokens[1].view(2, 2, -1), tokens[2].view(2, 2, -1)])  # two crops, one below the other
    rows = torch.cat([mosaic, newline.expand(4, 1, -1)], dim=1).flatten(0, 1)
    torch.testing.assert_close(features, torch.cat([tokens[0], rows]))
    place = torch.where(inputs["input_ids"][0] == hosts.IMAGE)[0]
    kept = prepared["position_ids"][0][prepared["input_ids"][0] == hosts.IMAGE] - place[0]
    assert kept[:4].tolist() == [5, 7, 13, 15]
    assert kept[4:7].tolist() == [16 + 5 + 1, 16 + 5 + 3, 16 + 5 + 4]  # row 1 of rows of 4 and a newline


def test_a_budget_too_small_for_crops_keeps_the_overview():
    blocks = [Block(columns=torch.arange(16), grid=(4, 4)), Block(columns=torch.arange(64), grid=(8, 8))]
    assert small_side(4, (100, 100), (2, 2), 80, blocks) == (4, True)
    assert small_side(4, (100, 100), (2, 2), 79, blocks) == (3, True)
    shrunk = [blocks[0], Block(columns=torch.arange(36), grid=(6, 6))]
    assert small_side(4, (100, 100), (2, 2), 52, shrunk) == (4, True)
    assert small_side(4, (100, 100), (2, 2), 51, shrunk) == (3, True)
    assert small_side(4, (100, 100), (2, 2), 4, blocks) == (2, False)


def test_encoded_pictures_cannot_be_made_smaller():
    found = host("llava_next")
    inputs = found.prompt([(1, [("image", 1)])])
    outputs = found.family.encode(found.model, inputs)
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with attach(found.model, "downsample") as plugin, pytest.raises(ValueError, match="Give pixels"):
        plugin.prepare({**rest, "mm_encoder_outputs": outputs})


def test_a_mosaic_that_the_host_shrinks_stays_as_it_is_at_full_size():
    found = zoo.HOSTS["llava_onevision"]()
    found.model.config.vision_aspect_ratio = "anyres_max_1"
    inputs = found.prompt([(1, [("image", 1)]), (2, [("image", 3)])])
    plain = logits_of(found, inputs)
    with attach(found.model, "downsample", keep=1.0):
        torch.testing.assert_close(logits_of(found, inputs), plain, atol=1e-5, rtol=0)
    with attach(found.model, "downsample", keep=20) as plugin:
        assert logits_of(found, inputs).isfinite().all()
        assert all(left < sum(full) for left, full in zip(plugin.trace.image[0], plugin.trace.images))


@pytest.mark.parametrize("size", [(30, 112), (112, 20), (10, 200), (3, 300)])
@pytest.mark.parametrize("method", ["downsample", "globalcom2", "visionzip", "hired"])
def test_pictures_that_padding_nearly_fills(method, size):
    found = host("llava_next")
    inputs: dict[str, Any] = {"image_sizes": torch.tensor([size])}
    tiles = found.family.tiles(found.model, inputs)[0]
    inputs["pixel_values"] = hosts.picture(1, tiles, 3, 56, 56)
    length = len(found.family.encode(found.model, inputs)["image"].pooler_output[0])
    ids = torch.tensor([[1, 2, *[hosts.IMAGE] * length, 3]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for keep in (0.25, 2, 20):
        with attach(found.model, method, keep=keep) as plugin:
            assert logits_of(found, inputs).isfinite().all()
            assert plugin.trace.image[0][0] < length or keep == 20
