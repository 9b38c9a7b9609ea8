"""Token blocks: places, splicing, parsing, constrained generation, boxes."""

from __future__ import annotations

import pytest
import torch

from vistok.vocabulary import (
    AURORA_DEPTH,
    AURORA_PIXEL,
    SEED_IMAGE,
    Block,
    GrammarProcessor,
    Vocabulary,
    box_text,
    box_to_codes,
    codes_to_box,
)

TOY = Block(name="toy", size=4, template="<t{}>", start="<t>", end="</t>", length=3)
FREE = Block(name="free", size=5, template="<f{}>", start="<f>", end="</f>", markers_first=True)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    found = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="[UNK]")


def test_ids_of_seed_and_aurora_on_llama_are_the_published_ones():
    seed = Vocabulary.at(32000, SEED_IMAGE)["image"]
    assert (seed.first, seed.start, seed.end) == (32000, 40192, 40193)
    both = Vocabulary.at(32000, AURORA_DEPTH, AURORA_PIXEL)
    assert (both["depth"].start, both["depth"].end, both["depth"].first + 5) == (32000, 32001, 32007)
    assert both["pixel"].first == 32130
    assert AURORA_DEPTH.strings()[:3] == ["<DEPTH_START>", "<DEPTH_END>", "<DEPTH_0>"]
    assert SEED_IMAGE.strings()[7] == "<img_00007>"


def test_what_was_spliced_is_parsed_and_stripped_again():
    vocabulary = Vocabulary.at(100, SEED_IMAGE, AURORA_DEPTH)
    codes, depth = torch.randint(8192, (32,)), torch.randint(128, (100,))
    sequence = [1, 2, *vocabulary.splice("image", codes), 3, *vocabulary.splice("depth", depth), 4]
    assert len(sequence) == 4 + 34 + 102
    image, found = vocabulary.parse(torch.tensor(sequence))
    assert torch.equal(image.codes, codes)
    assert torch.equal(found.codes, depth)
    assert (image.block, image.span) == ("image", (2, 36))
    seed, aurora = vocabulary["image"], vocabulary["depth"]
    assert vocabulary.strip(sequence) == [1, 2, seed.start, seed.end, 3, aurora.start, aurora.end, 4]


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ([0] * 99, "holds 99 codes and an item has 100"),
        ([0] * 101, "holds 101 codes and an item has 100"),
        ([0] * 99 + [200], "holds tokens that are no codes of 'depth'"),
    ],
)
def test_malformed_items_are_reported_and_kept(inside, message):
    vocabulary = Vocabulary.at(1000, AURORA_DEPTH)
    place = vocabulary["depth"]
    sequence = [5, place.start, *(place.first + c for c in inside), place.end, 6]
    (item,) = vocabulary.parse(sequence)
    assert item.codes is None
    assert message in item.error
    assert vocabulary.strip(sequence) == sequence


def test_a_missing_end_does_not_swallow_the_next_item():
    vocabulary = Vocabulary.at(10, TOY)
    good = vocabulary.splice("toy", [1, 2, 3])
    first, second = vocabulary.parse([*good[:-1], *good])
    assert "has no </t>" in first.error
    assert first.span == (0, 4)
    assert second.codes.tolist() == [1, 2, 3]


def test_free_standing_codes_are_found_as_runs():
    vocabulary = Vocabulary.at(50, AURORA_PIXEL)
    items = vocabulary.parse([1, 50, 51, 2, 385, 386])
    assert [(i.codes.tolist(), i.span) for i in items] == [([0, 1], (1, 3)), ([335], (4, 5))]


def test_codes_outside_and_wrong_counts_are_refused():
    vocabulary = Vocabulary.at(10, TOY)
    with pytest.raises(ValueError, match=r"Codes of 'toy' are 0..3, got 0..4"):
        vocabulary.splice("toy", [0, 4, 1])
    with pytest.raises(ValueError, match="An item of 'toy' has 3 codes, got 2"):
        vocabulary.splice("toy", [0, 1])
    with pytest.raises(KeyError, match="no block 'top'.*toy"):
        vocabulary["top"]
    with pytest.raises(ValueError, match="share the id 12"):
        Vocabulary([*Vocabulary.at(10, TOY).blocks.values(), *Vocabulary.at(12, FREE).blocks.values()])
    with pytest.raises(ValueError, match=r"one row, \(L,\), got \(1, 3\)"):
        vocabulary.parse(torch.zeros(1, 3, dtype=torch.int64))


def test_blocks_join_a_tokenizer_once_and_are_found_again(tokenizer):
    with pytest.raises(ValueError, match="no token '<t0>' of block 'toy'"):
        Vocabulary.of(tokenizer, TOY)
    first = Vocabulary.add_to(tokenizer, TOY, FREE)
    again = Vocabulary.add_to(tokenizer, TOY, FREE)
    assert first.blocks == again.blocks == Vocabulary.of(tokenizer, TOY, FREE).blocks
    assert tokenizer.convert_ids_to_tokens(first.splice("toy", [3, 0, 1])) == ["<t>", "<t3>", "<t0>", "<t1>", "</t>"]
    assert tokenizer(TOY.text([3, 0, 1]))["input_ids"] == first.splice("toy", [3, 0, 1])


def test_codes_in_another_order_are_refused(tokenizer):
    tokenizer.add_tokens(["<t1>", "<t0>", "<t2>", "<t3>", "<t>", "</t>"])
    with pytest.raises(ValueError, match="in another order"):
        Vocabulary.of(tokenizer, TOY)


@pytest.mark.parametrize("limits", [{}, {"toy": 1, "free": 2}])
def test_random_logits_always_give_whole_items(limits):
    vocabulary = Vocabulary.at(6, TOY, FREE)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 19, (8, 5), generator=generator)  # may hold broken items, which do not count
    grammar = GrammarProcessor(vocabulary, prompt_length=5, limits=limits)
    ids = prompt
    for _ in range(60):
        scores = grammar(ids, torch.randn(8, 19, generator=generator))
        assert bool(torch.isfinite(scores).any(1).all())
        ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1, generator=generator)], dim=1)
    seen = 0
    for row in ids[:, 5:]:
        items = vocabulary.parse(row)
        unfinished = [i for i in items if i.error]
        assert all(i.span[1] == 60 for i in unfinished)  # only the last may be cut off by the end
        assert all(len(i.codes) >= 1 for i in items if not i.error)
        for name, most in limits.items():
            assert sum(i.block == name for i in items) <= most
        stray = set(vocabulary.strip(row, [i for i in items if not i.error])) - set(range(6))
        markers = {p for place in vocabulary.blocks.values() for p in (place.start, place.end)}
        assert unfinished or stray <= markers
        seen += len(items)
    assert seen > 8


def test_generation_can_be_made_to_begin_with_an_item():
    vocabulary = Vocabulary.at(6, TOY)
    grammar = GrammarProcessor(vocabulary, prompt_length=2, force="toy")
    ids = torch.zeros(3, 2, dtype=torch.int64)
    for _ in range(5):
        ids = torch.cat([ids, grammar(ids, torch.randn(3, 12)).argmax(1, keepdim=True)], dim=1)
    assert all(vocabulary.parse(row)[0].error is None for row in ids[:, 2:])


def test_beams_of_transformers_generate_keep_the_grammar():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    vocabulary = Vocabulary.at(6, TOY)
    prompt = torch.randint(1, 6, (2, 4))
    grammar = GrammarProcessor(vocabulary, prompt_length=4, limits={"toy": 1}, force="toy")
    out = model.generate(prompt, max_new_tokens=9, num_beams=3, do_sample=False, logits_processor=[grammar])
    for row in out[:, 4:]:
        (item,) = vocabulary.parse(row)
        assert item.error is None
        assert item.span == (0, 5)


def test_a_model_without_the_added_rows_and_limits_of_free_blocks_are_refused():
    vocabulary = Vocabulary.at(6, TOY, AURORA_PIXEL)
    with pytest.raises(ValueError, match=r"ids beyond the 10 of the model. Call model.resize_token_embeddings"):
        GrammarProcessor(vocabulary, prompt_length=0)(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 10))
    with pytest.raises(ValueError, match="'pixel' has no markers"):
        GrammarProcessor(vocabulary, prompt_length=0, limits={"pixel": 1})


def test_boxes_keep_their_place_to_half_a_bin():
    size, generator = (480, 640), torch.Generator().manual_seed(0)
    for _ in range(50):
        x = (torch.rand(2, generator=generator).sort().values * 640).tolist()
        y = (torch.rand(2, generator=generator).sort().values * 480).tolist()
        box = (x[0], y[0], x[1], y[1])
        codes = box_to_codes(box, size)
        back = codes_to_box(codes, size)
        step = (640 / 336, 480 / 336) * 2
        assert all(abs(a - b) <= (0.5 if c < 335 else 1) * s + 1e-6 for a, b, c, s in zip(box, back, codes, step))
    assert box_to_codes((0, 0, 640, 480), size) == [0, 0, 335, 335]
    assert box_text([0, 1, 2, 335]) == "(<PIXEL_0>,<PIXEL_1>,<PIXEL_2>,<PIXEL_335>)"
    with pytest.raises(ValueError, match="no .* inside a picture of 480x640"):
        box_to_codes((0, 0, 641, 10), size)
    with pytest.raises(ValueError, match=r"four codes 0..335"):
        codes_to_box([0, 1, 2, 336], size)
