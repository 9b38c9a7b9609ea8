"""`Tokens` and the packing of ids."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok import Tokens
from vistok.tokens import pack, packed_bytes, stack, unpack


def tokens(batch: int = 3, n: int = 8, **changes: object) -> Tokens:
    ids = torch.arange(batch * n).view(batch, n) % 16
    return Tokens(**{"ids": ids, "codes": ids.unsqueeze(-1).float(), "vocab": (16,), "size": (32, 48), **changes})


def test_lengths_are_full_unless_given() -> None:
    assert tokens().lengths.tolist() == [8, 8, 8]


def test_continuous_tokens_have_no_ids_and_no_bits() -> None:
    found = tokens(ids=None, vocab=())
    assert (found.num_tokens, found.bits, len(found)) == (8, 0.0, 3)


def test_bits_are_summed_over_the_groups() -> None:
    assert tokens(ids=torch.zeros(1, 2, 3, dtype=torch.int64), codes=None, vocab=(8, 8, 16)).bits == 10.0


def test_mask_follows_the_lengths() -> None:
    mask = tokens(2, 4, lengths=torch.tensor([4, 1])).mask
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": None, "codes": None}, ValueError, "need ids or codes"),
        ({"ids": torch.zeros(3, 8)}, TypeError, r"int64 and got torch.float32. Convert with ids.long\(\)"),
        ({"ids": torch.zeros(3, 8, dtype=torch.int32)}, TypeError, "int64 and got torch.int32"),
        ({"ids": torch.zeros(8, dtype=torch.int64)}, ValueError, r"\(B, N\) or \(B, N, G\) and got \(8,\)"),
        ({"ids": torch.zeros(3, 2, 2, 2, dtype=torch.int64)}, ValueError, "keep the grid in `grid`"),
        ({"grid": (2, 3)}, ValueError, r"grid of \(2, 3\) holds 6 tokens, not 8"),
        ({"text": ("one",)}, ValueError, "3 pictures and 1 captions"),
        ({"vocab": (4, 4)}, ValueError, "1 groups and the vocabulary 2"),
    ],
)
def test_what_cannot_be_tokens_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokens(**changes)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([2, 2]), [2, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
        (slice(3, 9), []),
    ],
)
def test_rows_are_picked_with_all_that_belongs_to_them(index: object, rows: list[int]) -> None:
    whole = tokens(text=("a", "b", "c"), lengths=torch.tensor([8, 7, 6]))
    found = whole[index]
    assert torch.equal(found.ids, whole.ids[rows])
    assert torch.equal(found.codes, whole.codes[rows])
    assert found.lengths.tolist() == [8 - r for r in rows]
    assert found.text == tuple("abc"[r] for r in rows)


@pytest.mark.parametrize("index", [3, -4, [0, 7]])
def test_a_row_that_is_not_there_is_an_index_error(index: object) -> None:
    with pytest.raises(IndexError):
        tokens()[index]


def test_iteration_gives_every_picture_once() -> None:
    assert [int(t.ids[0, 0]) for t in tokens()] == [0, 8, 0]


def test_a_prefix_shortens_ids_codes_and_lengths() -> None:
    found = tokens(lengths=torch.tensor([8, 5, 2]))[:, :4]
    assert (found.ids.shape, found.codes.shape, found.lengths.tolist()) == ((3, 4), (3, 4, 1), [4, 4, 2])


def test_a_prefix_longer_than_the_code_is_the_code() -> None:
    assert tokens()[:, :99].num_tokens == 8


@pytest.mark.parametrize("columns", [slice(1, None), slice(None, None, 2), 3])
def test_other_columns_than_a_prefix_are_refused(columns: object) -> None:
    with pytest.raises(IndexError, match=r"prefix such as tokens\[:, :32\]"):
        tokens()[:, columns]


def test_a_prefix_of_grid_tokens_is_refused() -> None:
    with pytest.raises(IndexError, match=r"lie on a \(2, 4\) grid"):
        tokens(grid=(2, 4))[:, :4]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (tokens(), "Tokens(3 x 8 tokens, 4 bits each)"),
        (tokens(grid=(2, 4)), "Tokens(3 x 8 tokens, 4 bits each, grid 2x4)"),
        (tokens(lengths=torch.tensor([8, 2, 3])), "Tokens(3 x 2..8 tokens, 4 bits each)"),
        (tokens(ids=None, vocab=()), "Tokens(3 x 8 tokens, continuous, 1 channels)"),
        (tokens()[:0], "Tokens(0 x 0 tokens, 4 bits each)"),
    ],
)
def test_tokens_print_as_one_line(found: Tokens, words: str) -> None:
    assert repr(found) == words


VOCABULARIES = st.lists(st.integers(1, 2**18), min_size=1, max_size=4)


@st.composite
def packed_ids(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Ids of one picture with their vocabulary, mixed radix, any number of groups."""
    vocab = tuple(draw(VOCABULARIES))
    n = draw(st.integers(0, 40))
    rows = [[draw(st.integers(0, v - 1)) for v in vocab] for _ in range(n)]
    ids = torch.tensor(rows, dtype=torch.int64).view(n, len(vocab))
    return (ids.view(n) if len(vocab) == 1 else ids), vocab


@given(packed_ids())
def test_ids_survive_packing(case: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    ids, vocab = case
    assert torch.equal(unpack(pack(ids, vocab), len(ids), vocab), ids)


@given(st.integers(0, 300), VOCABULARIES)
def test_packing_takes_the_fewest_whole_bytes(n: int, vocab: list[int]) -> None:
    states = math.prod(vocab) ** n
    size = packed_bytes(n, vocab)
    assert 256**size >= states
    assert size == 0 or 256 ** (size - 1) < states


def test_128_ids_of_4096_take_192_bytes() -> None:
    assert len(pack(torch.randint(4096, (128,)), (4096,))) == 192


def test_powers_of_two_are_plain_bit_packing() -> None:
    assert pack(torch.tensor([0xABC, 0x123]), (4096,)) == bytes([0xBC, 0x3A, 0x12])


def test_groups_are_digits_of_one_number() -> None:
    assert pack(torch.tensor([[2, 4], [1, 0]]), (3, 5)) == bytes([2 + 3 * 4 + 15 * 1])


@pytest.mark.parametrize("vocab", [(2**18,), (8, 8, 8, 5, 5, 5)])
def test_the_ids_of_a_large_picture_survive_packing(vocab: tuple[int, ...]) -> None:
    ids = torch.stack([torch.randint(v, (16384,)) for v in vocab], 1).squeeze(1)
    assert torch.equal(unpack(pack(ids, vocab), 16384, vocab), ids)


@pytest.mark.parametrize(
    ("ids", "vocab", "message"),
    [
        ([16], (16,), r"outside 0..15 \(seen 16..16\)"),
        ([-1], (16,), "outside 0..15"),
        ([[1, 5]], (16, 4), "outside"),
        ([[1, 2]], (16,), r"Ids of \(1, 2\) do not have the 1 groups"),
        ([1], (16, 16), "do not have the 2 groups"),
    ],
)
def test_ids_that_do_not_fit_the_vocabulary_are_not_packed(ids: list, vocab: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(torch.tensor(ids), vocab)


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens of this vocabulary take 2 bytes, got 3"):
        unpack(b"abc", 3, (16,))


def test_bytes_that_no_ids_give_are_refused() -> None:
    with pytest.raises(ValueError, match="no valid ids"):
        unpack(bytes([9]), 2, (3,))


def test_stacked_rows_keep_their_length_and_text() -> None:
    long, short = tokens(2, text=("a", "b")), tokens(1, text=("c",))[:, :3]
    found = stack([long, short])
    assert (found.lengths.tolist(), found.text) == ([8, 8, 3], ("a", "b", "c"))
    assert torch.equal(found.ids[2], torch.tensor([0, 1, 2, 0, 0, 0, 0, 0]))
    assert found.codes.shape == (3, 8, 1)


@pytest.mark.parametrize("parts", [[], [tokens(), tokens(size=(1, 1))], [tokens(), tokens(codes=None)]])
def test_what_does_not_belong_together_is_not_stacked(parts: list[Tokens]) -> None:
    with pytest.raises(ValueError, match="no tokens to stack|cannot form one batch"):
        stack(parts)
