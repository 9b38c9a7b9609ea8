"""Trained compressors on hosts: what they read, batches, crops, precision, saving, refusals."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

import vistok
from tests.plugins import hosts, zoo
from vistok.compress.compressors.base import TrainedCompressor
from vistok.plugins.attach import attach
from vistok.plugins.compressed import build_for, question_columns, scaled_levels
from vistok.plugins.families.base import family_of

NAMES = ["quecc", "token_packer"]
RAGGED = (1, 3, 0)
CROPS = ["llava_next", "llava_onevision"]
MERGING = ["internvl", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def llava() -> Any:
    return hosts.llava()


@cache
def host(name: str) -> zoo.Host:
    return zoo.HOSTS[name]()


def made_for(model: Any, name: str, **config: Any) -> TrainedCompressor:
    """With weights large enough that the question and the picture show in the logits."""
    torch.manual_seed(1)
    found = build_for(model, family_of(model), name, **{"window": 2, **config}).eval()
    for parameter in found.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return found.requires_grad_(False)


def logits_of(model: Any, inputs: dict[str, Any], steps: int = 2) -> torch.Tensor:
    return hosts.logits(hosts.generate(model, inputs, steps=steps))


def tokens_of(model: Any, inputs: dict[str, Any], compressor: TrainedCompressor) -> list[torch.Tensor]:
    """What stands in the language model's prompt for every picture."""
    with attach(model, compressor.registry_name, compressor=compressor) as plugin:
        found: list[torch.Tensor] = plugin.prepare(inputs)["mm_encoder_outputs"]["image"].pooler_output
        return found


@pytest.mark.parametrize("renumber", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_padded_batch_is_its_samples_and_detaching_is_exact(llava, name, renumber):
    inputs = hosts.llava_inputs(RAGGED, seed=3)
    plain, keys, attributes = logits_of(llava, inputs), list(llava.state_dict()), set(vars(llava))
    with attach(llava, name, compressor=made_for(llava, name, renumber=renumber)) as plugin:
        assert list(llava.state_dict()) == keys
        batch = logits_of(llava, inputs, steps=3)
        assert plugin.trace.image[0] == [4, 12, 0] and plugin.report().flops < plugin.report().flops_without
        for row, single in enumerate(hosts.split_rows(inputs, RAGGED)):
            torch.testing.assert_close(batch[row], logits_of(llava, single, steps=3)[0], atol=2e-5, rtol=0)
    assert (batch[:2, :2] - plain[:2]).abs().max() > 1e-3
    assert torch.equal(logits_of(llava, inputs), plain) and set(vars(llava)) == attributes


def test_positions_are_counted_anew_or_those_of_the_middle_of_each_window(llava):
    inputs = hosts.llava_inputs((1,))
    start = int((inputs["input_ids"][0] == hosts.IMAGE).nonzero()[0])
    for renumber in (True, False):
        compressor = made_for(llava, "token_packer", renumber=renumber)
        with attach(llava, "token_packer", compressor=compressor) as plugin:
            prepared = plugin.prepare(inputs)
        if renumber:
            assert "position_ids" not in prepared
        else:
            assert (prepared["position_ids"][0, start : start + 4] - start).tolist() == [5, 7, 13, 15]


def test_the_network_gets_the_hidden_states_that_transformers_numbers_so(llava):
    compressor = made_for(llava, "token_packer", levels=[1, 3])
    inputs = hosts.llava_inputs((2,))
    states = llava.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    levels = torch.cat([states[1], states[3]], dim=-1)[:, 1:]
    expected = compressor(states[-2][:, 1:], levels, (4, 4))
    for ours, theirs in zip(tokens_of(llava, inputs, compressor), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("first", [None, 5], ids=["no begin token", "begin token"])
def test_the_question_is_what_the_language_model_says_at_its_end_when_it_reads_it_alone(llava, first):
    model = copy.deepcopy(llava)
    model.model.language_model.config.bos_token_id = first
    compressor = made_for(model, "quecc", skip=(1, 2))
    inputs = hosts.llava_inputs((1,), seed=2)
    ids = inputs["input_ids"][0]
    behind = ids[int((ids == hosts.IMAGE).nonzero()[-1]) + 1 :]
    assert len(behind) > 3
    alone = torch.cat([torch.tensor([first] if first else [], dtype=torch.int64), behind[1:-2]])[None]
    text = model.model.language_model(input_ids=alone).last_hidden_state[:, -1]
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    levels = torch.cat([states[i] for i in compressor.levels], dim=-1)[:, 1:]
    expected = compressor(states[-2][:, 1:], levels, (4, 4), text)
    torch.testing.assert_close(tokens_of(model, inputs, compressor)[0], expected[0], atol=1e-5, rtol=1e-4)
    mean = made_for(model, "quecc", question="embeddings")
    expected = mean(states[-2][:, 1:], levels, (4, 4), model.get_input_embeddings()(behind).mean(0)[None])
    torch.testing.assert_close(tokens_of(model, inputs, mean)[0], expected[0], atol=1e-5, rtol=1e-4)


def test_another_question_asks_for_other_tokens_unless_none_is_read(llava):
    inputs = hosts.llava_inputs((1,))
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -2] = (other["input_ids"][0, -2] + 1) % 50
    for config, same in (({}, False), ({"question": "embeddings"}, False), ({"text_dim": None}, True)):
        compressor = made_for(llava, "quecc", **config)
        (one,), (two,) = tokens_of(llava, inputs, compressor), tokens_of(llava, other, compressor)
        assert torch.equal(one, two) == same


def test_a_picture_is_asked_by_the_text_behind_it_up_to_the_first_answer():
    #       text  image   text  image  image  text
    real = [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    kwargs = {"attention_mask": torch.tensor([real])}
    found = question_columns(kwargs, {"image": mask}, [2, 2, 2], (0, 0))
    assert [columns.tolist() for _, columns in found] == [[4, 5, 10, 11], [10, 11], [10, 11]]
    kwargs["labels"] = torch.tensor([[-100, 7, -100, -100, -100, 7, -100, -100, -100, -100, -100, 7]])
    found = question_columns(kwargs, {"image": mask}, [2, 2, 2], (0, 0))
    assert [columns.tolist() for _, columns in found] == [[4], [10], [10]]
    last = torch.tensor([[0, 0, 0, 1]]).bool()
    assert question_columns({}, {"image": last}, [1], (1, 1))[0][1].tolist() == [1]
    assert question_columns({}, {"image": last}, [1], (2, 2))[0][1].tolist() == [0, 1, 2]  # nothing would be left


def test_answers_in_training_are_not_given_away(llava):
    compressor = made_for(llava, "quecc")
    inputs = hosts.llava_inputs((1,))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -2:] += 1
    answered = [tokens_of(llava, {**given, "labels": labels}, compressor)[0] for given in (inputs, other)]
    assert torch.equal(*answered)


@pytest.mark.parametrize("host_name", CROPS)
@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_several_crops(host_name, name):
    found = host(host_name)
    batch: list[tuple[int, zoo.Sample]] = [(1, [("image", 2)]), (2, [("image", 1), ("image", 3)]), (3, [])]
    batch += [(5, [("video", 2), ("image", 4)])] if found.video else []
    inputs = found.prompt(batch)
    plain = logits_of(found.model, inputs)
    with attach(found.model, name, compressor=made_for(found.model, name)) as plugin:
        together = logits_of(found.model, inputs)
        left, full = plugin.trace.image[0], plugin.trace.images
        for row, sample in enumerate(batch):
            alone = logits_of(found.model, found.prompt([sample]))
            torch.testing.assert_close(together[row], alone[0], atol=5e-5, rtol=0)
    assert all(n < sum(sizes) or not sizes for n, sizes in zip(left, full))
    if found.video:
        assert left[-1] > full[-1][1]  # the clip is whole
    assert torch.equal(logits_of(found.model, inputs), plain)


def test_crops_are_compressed_one_by_one_and_packed_like_the_hosts_own():
    found = host("llava_next")
    inputs = found.prompt([(1, [("image", 1)])])  # 100 x 50 in 2 x 1 crops
    compressor = made_for(found.model, "token_packer")
    states = found.model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states
    levels = torch.cat([states[i] for i in compressor.levels], dim=-1)[:, 1:]
    tiles = compressor(states[-2][:, 1:], levels, (4, 4))  # (3, 4, D)
    newline = found.model.model.image_newline[None]
    mosaic = tiles[1:].reshape(4, 2, -1)
    rows = torch.cat([mosaic, newline.expand(4, 1, -1)], dim=1).flatten(0, 1)
    torch.testing.assert_close(tokens_of(found.model, inputs, compressor)[0], torch.cat([tiles[0], rows]))


@pytest.mark.parametrize("name", MERGING)
def test_projectors_that_take_several_patches_are_refused(name):
    found = host(name)
    with pytest.raises(TypeError, match="needs patches, which .* does not give: its projector takes"):
        build_for(found.model, found.family, "quecc")
    attributes = set(vars(found.model))
    with pytest.raises(TypeError, match="needs patches"):
        attach(found.model, "quecc", compressor=made_for(hosts.llava(), "quecc"))
    assert set(vars(found.model)) == attributes


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_gives_the_same_logits_to_the_bit(llava, tmp_path, name):
    compressor, inputs = made_for(llava, name), hosts.llava_inputs((1, 2))
    compressor.save_pretrained(tmp_path)
    found = []
    for given in (compressor, str(tmp_path), vistok.load(tmp_path)):
        with attach(llava, name, compressor=given):
            found.append(logits_of(llava, inputs))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with attach(llava, {"name": name, "compressor": str(tmp_path)}) as plugin:
        assert plugin.method.config()["compressor"] == str(tmp_path)


def test_a_copy_of_the_host_carries_its_own(llava):
    with attach(llava, "quecc", compressor=made_for(llava, "quecc")):
        twin = copy.deepcopy(llava)
    inputs = hosts.llava_inputs((1,))
    with attach(llava, "quecc", compressor=made_for(llava, "quecc")):
        assert torch.equal(logits_of(twin, inputs), logits_of(llava, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_hosts(llava, name):
    model = copy.deepcopy(llava).bfloat16()
    inputs = hosts.llava_inputs((1, 2))
    rough = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    compressor = made_for(llava, name)
    for given in (compressor, copy.deepcopy(compressor).bfloat16()):
        for ours, theirs in zip(tokens_of(model, rough, given), tokens_of(llava, inputs, compressor)):
            assert ours.dtype == torch.bfloat16
            assert (ours.float() - theirs).norm() < 0.1 * theirs.norm()
        with attach(model, name, compressor=given):
            assert logits_of(model, rough).isfinite().all()


def test_gradients_reach_the_compressor_alone(llava):
    compressor = made_for(llava, "quecc").requires_grad_(True)
    inputs = hosts.llava_inputs((1, 2))
    with attach(llava, "quecc", compressor=compressor):
        llava(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in compressor.parameters())
    assert all(p.grad is None for p in llava.parameters())


def test_windows_can_be_painted(llava):
    with attach(llava, "token_packer", compressor=made_for(llava, "token_packer")) as plugin:
        logits_of(llava, hosts.llava_inputs((1,)))
        slots, sizes = plugin.runtime.pictures.fate(plugin.runtime, 0, torch.arange(16))
        assert slots[:2, :2].unique().tolist() == [0] and int(slots[3, 3]) == 3 and sizes.unique().tolist() == [4]


def test_beams_and_a_second_turn(llava):
    inputs = hosts.llava_inputs((1, 2), seed=5)
    with attach(llava, "quecc", compressor=made_for(llava, "quecc")):
        batch = hosts.generate(llava, inputs, num_beams=2)
        for row, single in enumerate(hosts.split_rows(inputs, (1, 2))):
            alone = hosts.generate(llava, single, num_beams=2)
            assert torch.equal(batch.sequences[row, -4:], alone.sequences[0, -4:])
        first = hosts.generate(llava, hosts.llava_inputs((1,)))
        more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        on = hosts.generate(
            llava,
            {"input_ids": more, "attention_mask": torch.ones_like(more)},
            past_key_values=first.past_key_values,
        )
        assert on.sequences.shape[1] == more.shape[1] + 4


def test_the_published_levels_scale_with_the_tower():
    assert scaled_levels(24) == (12, 16, 22, 23) and scaled_levels(12) == (6, 8, 11, 12)


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("quecc", {}, "has weights of its own: give compressor="),
        ("token_packer", {"made": "quecc"}, r"this is a quecc: attach\(model, 'quecc'"),
        ("quecc", {"made": "quecc", "out_dim": 64}, "language model width 64, the host's is 32"),
        ("quecc", {"made": "quecc", "dim": 16, "levels_dim": 128}, "tower width 16, the host's is 32"),
        ("quecc", {"made": "quecc", "text_dim": 8}, "question width 8, the host's is 32"),
        ("quecc", {"made": "quecc", "levels": [1, 9]}, "tower has 3 blocks"),
        ("quecc", {"made": "quecc", "levels_dim": 96}, "width of the levels 96, the host's is 128"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(llava, name, given, match):
    attributes = set(vars(llava))
    made = given.pop("made", None)
    compressor = None if made is None else made_for(llava, made, **given)
    with pytest.raises(ValueError, match=match):
        attach(llava, name, compressor=compressor)
    assert set(vars(llava)) == attributes


def test_pictures_that_windows_do_not_cover_and_encoded_ones_are_refused(llava):
    inputs = hosts.llava_inputs((1,))
    three = made_for(llava, "token_packer", window=3, grid=(6, 6))
    with attach(llava, "token_packer", compressor=three), pytest.raises(ValueError, match=r"\(4, 4\) cannot be cut"):
        logits_of(llava, inputs)
    encoded = {"image": llava.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    with (
        attach(llava, "quecc", compressor=made_for(llava, "quecc")) as plugin,
        pytest.raises(ValueError, match="comes with encoded pictures"),
    ):
        plugin.prepare({**inputs, "mm_encoder_outputs": encoded})


def test_a_class_token_among_the_patches_is_refused(llava):
    model = copy.deepcopy(llava)
    model.config.vision_feature_select_strategy = "full"
    compressor = made_for(llava, "quecc")
    with attach(model, "quecc", compressor=compressor) as plugin, pytest.raises(TypeError, match="patches alone"):
        plugin.prepare(hosts.llava_inputs((1,)))


def test_something_else_is_no_compressor(llava, tmp_path):
    with pytest.raises(TypeError, match="got a Linear"):
        attach(llava, "quecc", compressor=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="There is no folder"):
        attach(llava, "quecc", compressor=str(tmp_path / "none"))
