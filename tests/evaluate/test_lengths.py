"""The shortest prefix that reaches a quality or fits a size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vistok
from tests.fill import image
from vistok.evaluate.lengths import fitting, shortest
from vistok.evaluate.pixel import MeanAbsoluteDifference, Psnr


class Rising:
    """A nested tokenizer whose error is 1 / (1 + length): quality grows with every token."""

    nested, options, registry_name, num_tokens, device = True, frozenset(), "rising", 100, torch.device("cpu")

    def __init__(self) -> None:
        self.decodes = 0

    def decode(self, tokens: vistok.Tokens) -> Tensor:
        self.decodes += 1
        return (1 / (1 + tokens.lengths.float())).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def rising(rows: int) -> tuple[Rising, vistok.Tokens, Tensor]:
    return Rising(), vistok.Tokens(ids=torch.zeros(rows, 100, dtype=torch.int64)), torch.zeros(rows, 3, 4, 4)


@pytest.mark.parametrize("goal", [6.1, 19.9, 26.0, 39.9])
def test_the_smallest_length_that_reaches_the_goal_is_found_in_few_decodes(goal):
    tok, tokens, target = rising(3)
    found, reached = shortest(tok, tokens, target, Psnr(rounding=False), goal)
    values = 20 * torch.log10(1 + torch.arange(101.0))
    assert found.lengths.tolist() == [int((values >= goal).float().argmax())] * 3
    assert found.num_tokens == int(found.lengths.max())
    assert reached.all()
    assert tok.decodes <= 8


def test_one_token_is_enough_for_a_low_goal_and_all_stay_for_one_out_of_reach():
    tok, tokens, target = rising(1)
    assert shortest(tok, tokens, target, Psnr(rounding=False), 0.1)[0].lengths.tolist() == [1]
    found, reached = shortest(tok, tokens, target, Psnr(rounding=False), 90.0)
    assert (found.lengths.tolist(), reached.tolist()) == ([100], [False])


def test_metrics_that_fall_are_understood():
    tok, tokens, target = rising(1)
    found, _ = shortest(tok, tokens, target, MeanAbsoluteDifference(rounding=False), 0.101)
    assert found.lengths.tolist() == [9]


def test_rows_find_their_own_length_on_a_real_model():
    tok = vistok.create("tokenizer", "one_d_piece_tiny").eval()
    x = image(3, 64)
    tokens = tok.encode(x)
    full = Psnr().update(tok.decode(tokens), x)
    found, reached = shortest(tok, tokens, x, Psnr(), float(full.median()))
    values = Psnr().update(tok.decode(found), x)
    assert reached.tolist() == (full >= full.median()).tolist()
    assert torch.equal(values >= full.median() - 1e-4, reached)


@pytest.mark.parametrize(("size", "count"), [(11, 1), (17, 7), (26, 16), (1000, 16)])
def test_bytes_become_tokens(size, count):
    tok = vistok.create("tokenizer", "one_d_piece_tiny").eval()
    found = fitting(tok, tok.encode(image(1, 64)), size)
    assert found.num_tokens == count and len(tok.to_bytes(found)) == 10 + count


def test_the_byte_that_more_tokens_need_for_their_number_is_counted():
    tok = vistok.create("tokenizer", "one_d_piece_tiny", num_tokens=200).eval()
    tokens = tok.encode(image(1, 64))
    counts = [fitting(tok, tokens, size).num_tokens for size in (136, 137, 138, 139, 140)]
    assert counts == [126, 127, 127, 128, 129]


def test_sizes_no_code_fits_into_are_refused():
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    with pytest.raises(ValueError, match="A file of 25 bytes is too small: all 16 tokens of titok take more"):
        fitting(tok, tok.encode(image(1, 64)), 25)


def test_a_tokenizer_of_one_length_is_refused():
    tok = vistok.create("tokenizer", "titok_tiny").eval()
    x = image(1, 64)
    with pytest.raises(ValueError, match="titok is not nested: it always needs 16 tokens"):
        shortest(tok, tok.encode(x), x, Psnr(), 20.0)
