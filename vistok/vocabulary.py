"""Blocks of image, depth or box tokens in a language model's vocabulary: splice, parse, constrained decoding.

All functions work on ids. Strings are offered for tools that take text; many tokenizers split or join added tokens with
spaces when they decode, so ids are the safe way.

    vocabulary = Vocabulary.add_to(tokenizer, SEED_IMAGE)          # then model.resize_token_embeddings(len(tokenizer))
    prompt += vocabulary.splice("image", tokens.ids[0])            # <img> 32 codes </img>
    pictures = vocabulary.parse(generated)                         # items with their codes, or what is wrong with them
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vistok.registry import nearest


@dataclass(frozen=True, kw_only=True)
class Block:
    """A kind of token that a language model reads and writes like words.

    Attributes:
        name: What it is called here.
        size: Number of codes, V.
        template: Token string of a code, for `str.format`.
        start: Token before the codes of an item, None for free-standing codes.
        end: Token behind them.
        length: Codes of one item, None if it varies.
        markers_first: Whether `start` and `end` get ids before the codes (AURORA) or behind them (SEED).
    """

    name: str
    size: int
    template: str
    start: str | None = None
    end: str | None = None
    length: int | None = None
    markers_first: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or (self.length is not None and self.length < 1):
            raise ValueError(f"Block {self.name!r} has size {self.size} and length {self.length}: both are at least 1.")
        if (self.start is None) != (self.end is None):
            raise ValueError(f"Block {self.name!r} has one marker; give both start and end, or none.")

    def strings(self) -> list[str]:
        """All token strings in the order of their ids."""
        codes = [self.template.format(i) for i in range(self.size)]
        markers = [s for s in (self.start, self.end) if s is not None]
        return markers + codes if self.markers_first else codes + markers

    def text(self, codes: Sequence[int] | Tensor) -> str:
        """One item as a string, without separators."""
        inside = "".join(self.template.format(i) for i in _as_list(codes))
        return f"{self.start or ''}{inside}{self.end or ''}"


SEED_IMAGE = Block(name="image", size=8192, template="<img_{:05d}>", start="<img>", end="</img>", length=32)
"""SEED-LLaMA's image tokens (arXiv 2310.01218)."""
AURORA_DEPTH = Block(
    name="depth",
    size=128,
    template="<DEPTH_{}>",
    start="<DEPTH_START>",
    end="<DEPTH_END>",
    length=100,
    markers_first=True,
)
"""AURORA's depth map tokens (arXiv 2412.03548)."""
AURORA_PIXEL = Block(name="pixel", size=336, template="<PIXEL_{}>")
"""AURORA's pixel coordinates, four to a box."""


@dataclass(frozen=True)
class Placed:
    """Where a block lies: token ids of code 0 and of the markers (None without markers)."""

    block: Block
    first: int
    start: int | None
    end: int | None

    @property
    def stop(self) -> int:
        """One past the last code's id."""
        return self.first + self.block.size


@dataclass(frozen=True)
class Item:
    """One item found in a sequence.

    Attributes:
        block: Name of its block.
        span: Positions [begin, end) in the sequence, markers included.
        codes: Its codes, int64, (length,); None if it is malformed.
        error: What is wrong with it, None if nothing is.
    """

    block: str
    span: tuple[int, int]
    codes: Tensor | None
    error: str | None = None


class Vocabulary:
    """Blocks at their places in a language model's vocabulary.

    Args:
        placed: The blocks; ids may not overlap.
    """

    def __init__(self, placed: Sequence[Placed]) -> None:
        self.blocks = {p.block.name: p for p in placed}
        taken = sorted((low, high, p.block.name) for p in placed for low, high in _spans(p))
        for (_, high, one), (low, _, other) in itertools.pairwise(taken):
            if low < high:
                raise ValueError(f"The blocks {one!r} and {other!r} share the id {low}.")

    @classmethod
    def at(cls, offset: int, *blocks: Block) -> Vocabulary:
        """Blocks one after the other from an id on, e.g. 32000 for LLaMA."""
        placed = []
        for block in blocks:
            markers = 0 if block.start is None else 2
            first = offset + (markers if block.markers_first else 0)
            start = None if block.start is None else offset if block.markers_first else first + block.size
            placed.append(Placed(block, first, start, None if start is None else start + 1))
            offset += block.size + markers
        return cls(placed)

    @classmethod
    def add_to(cls, tokenizer: Any, *blocks: Block) -> Vocabulary:
        """Add the blocks' tokens to a transformers tokenizer, as ordinary tokens, and find their ids.

        Tokens that are there already are kept. The model's embeddings are resized by the caller:
        `model.resize_token_embeddings(len(tokenizer))`.
        """
        tokenizer.add_tokens([s for block in blocks for s in block.strings()])
        return cls.of(tokenizer, *blocks)

    @classmethod
    def of(cls, tokenizer: Any, *blocks: Block) -> Vocabulary:
        """Find the ids of blocks that a transformers tokenizer already has.

        Raises:
            ValueError: A token is missing, or the codes of a block do not follow each other.
        """
        return cls([_place(tokenizer, block) for block in blocks])

    def __getitem__(self, name: str) -> Placed:
        if name not in self.blocks:
            raise KeyError(f"The vocabulary has no block {name!r}. {nearest(name, self.blocks)}")
        return self.blocks[name]

    def to_ids(self, name: str, codes: Sequence[int] | Tensor) -> Tensor:
        """Codes of a block -> token ids, int64, the same shape.

        Raises:
            ValueError: A code outside the block.
        """
        place, found = self[name], torch.as_tensor(codes, dtype=torch.int64)
        if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < place.block.size):
            raise ValueError(
                f"Codes of {name!r} are 0..{place.block.size - 1}, got {int(found.min())}..{int(found.max())}."
            )
        return found + place.first

    def splice(self, name: str, codes: Sequence[int] | Tensor) -> list[int]:
        """One item, codes (N,), as token ids with its markers.

        Raises:
            ValueError: A code outside the block, or another number of codes than an item has.
        """
        place, found = self[name], torch.as_tensor(codes, dtype=torch.int64).flatten()
        if place.block.length is not None and len(found) != place.block.length:
            raise ValueError(f"An item of {name!r} has {place.block.length} codes, got {len(found)}.")
        inside: list[int] = self.to_ids(name, found).tolist()
        return inside if place.start is None or place.end is None else [place.start, *inside, place.end]

    def parse(self, sequence: Sequence[int] | Tensor) -> list[Item]:
        """Find every item between markers, well-formed or not, in order; free-standing codes are items of their run.

        An item without an end marker reaches to the next start marker of its block, or to the end of the sequence.
        """
        ids = _as_list(sequence)
        items = [item for place in self.blocks.values() for item in _items(ids, place)]
        return sorted(items, key=lambda item: item.span)

    def strip(self, sequence: Sequence[int] | Tensor, items: Sequence[Item] | None = None) -> list[int]:
        """The sequence without the codes of its items; markers stay as place holders, malformed items stay whole."""
        ids = _as_list(sequence)
        drop: set[int] = set()
        for item in self.parse(ids) if items is None else items:
            if item.error is None:
                inside = 0 if self[item.block].start is None else 1
                drop.update(range(item.span[0] + inside, item.span[1] - inside))
        return [token for i, token in enumerate(ids) if i not in drop]


def _spans(place: Placed) -> list[tuple[int, int]]:
    return [(place.first, place.stop), *((m, m + 1) for m in (place.start, place.end) if m is not None)]


def _place(tokenizer: Any, block: Block) -> Placed:
    def look_up(token: str) -> int:
        found = tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
            raise ValueError(f"The tokenizer has no token {token!r} of block {block.name!r}. Use Vocabulary.add_to.")
        return int(found)

    codes = [look_up(block.template.format(i)) for i in range(block.size)]
    if codes != list(range(codes[0], codes[0] + block.size)):
        raise ValueError(
            f"The tokenizer has the codes of block {block.name!r} in another order. Add them at once, in order."
        )
    markers = [None if s is None else look_up(s) for s in (block.start, block.end)]
    return Placed(block, codes[0], *markers)


def _as_list(values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor) and values.ndim != 1:
        raise ValueError(f"A sequence of ids is one row, (L,), got {tuple(values.shape)}. Take the rows one by one.")
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _items(ids: list[int], place: Placed) -> list[Item]:
    if place.start is None:
        return _runs(ids, place)
    begins = [i for i, token in enumerate(ids) if token == place.start]
    found = []
    for begin, limit in zip(begins, [*begins[1:], len(ids)]):
        end = next((i for i in range(begin + 1, limit) if ids[i] == place.end), None)
        found.append(_item(ids, place, begin, limit, end))
    return found


def _item(ids: list[int], place: Placed, begin: int, limit: int, end: int | None) -> Item:
    block = place.block
    span = (begin, limit if end is None else end + 1)
    inside = [token - place.first for token in ids[begin + 1 : span[1] - (end is not None)]]
    error = None
    if end is None:
        error = f"{block.start} at {begin} has no {block.end}."
    elif any(not 0 <= code < block.size for code in inside):
        error = f"{block.start} at {begin} holds tokens that are no codes of {block.name!r}."
    elif block.length is not None and len(inside) != block.length:
        error = f"{block.start} at {begin} holds {len(inside)} codes and an item has {block.length}."
    codes = None if error else torch.tensor(inside, dtype=torch.int64)
    return Item(block.name, span, codes, error)


def _runs(ids: list[int], place: Placed) -> list[Item]:
    """Runs of free-standing codes; cut into items of `length` where the block has one."""
    found, begin = [], None
    for i, token in enumerate([*ids, -1]):
        inside = place.first <= token < place.stop
        full = begin is not None and place.block.length is not None and i - begin == place.block.length
        if begin is not None and (not inside or full):
            codes = torch.tensor(ids[begin:i], dtype=torch.int64) - place.first
            short = place.block.length is not None and len(codes) != place.block.length
            error = f"{len(codes)} codes of {place.block.name!r} at {begin}, an item has {place.block.length}."
            found.append(Item(place.block.name, (begin, i), None if short else codes, error if short else None))
            begin = None
        if begin is None and inside:
            begin = i
    return found


@dataclass
class GrammarProcessor:
    """Logits processor for transformers' `generate`: items come out as START code ... code END, and whole.

    Outside an item neither codes nor END of a block may come; after START only codes, as many as an item has, then END
    (AURORA, arXiv 2412.03548, released decoding code; there for one map per answer and batch 1). Keeps no state between
    calls: everything follows from the ids, so that batches, beams and sampling work. Blocks without markers are left
    free.

    Attributes:
        vocabulary: The blocks.
        prompt_length: Ids before the generated ones, `input_ids.shape[1]` (0 with `inputs_embeds`); items in the prompt
            neither count nor have to be finished.
        limits: Most items per block and sequence, by block name; not limited if absent. AURORA has {"depth": 1}.
        force: Name of a block that generation has to begin with (SEED's "force image"), None for none.

    Example:
        >>> grammar = GrammarProcessor(vocabulary, prompt_length=inputs.input_ids.shape[1], limits={"depth": 1})
        >>> model.generate(**inputs, logits_processor=[grammar])
    """

    vocabulary: Vocabulary
    prompt_length: int
    limits: dict[str, int] = field(default_factory=dict)
    force: str | None = None

    def __post_init__(self) -> None:
        for name in (*self.limits, *([] if self.force is None else [self.force])):
            if self.vocabulary[name].start is None:
                raise ValueError(f"Block {name!r} has no markers, so the grammar cannot count or force its items.")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of what may not come next to -inf.

        Args:
            input_ids: Prompt and what was generated, int64, (B, L).
            scores: Logits of the next token, (B, V).
        """
        generated = input_ids[:, self.prompt_length :]
        banned = torch.zeros_like(scores, dtype=torch.bool)
        if self.force is not None and not generated.shape[1]:
            banned[:] = True
            banned[:, self.vocabulary[self.force].start] = False
            return scores.masked_fill(banned, -torch.inf)
        for place in self.vocabulary.blocks.values():
            if place.start is not None:
                self._ban(banned, generated, place)
        return scores.masked_fill(banned, -torch.inf)

    def _ban(self, banned: Tensor, generated: Tensor, place: Placed) -> None:
        """Enter what one block forbids, by row, into `banned` (B, V)."""
        block, columns = place.block, torch.arange(banned.shape[1], device=banned.device)
        if max(high for _, high in _spans(place)) > len(columns):
            raise ValueError(
                f"Block {block.name!r} has ids beyond the {len(columns)} of the model. Call "
                "model.resize_token_embeddings(len(tokenizer)) after adding tokens."
            )
        begun, ended = generated.eq(place.start or 0), generated.eq(place.end or 0)  # it has markers
        begin, end = _last(begun), _last(ended)
        is_open, count = begin > end, generated.shape[1] - 1 - begin  # (B,), codes since the last START
        full = count == block.length if block.length is not None else torch.zeros_like(is_open)
        is_code, is_end = (columns >= place.first) & (columns < place.stop), columns == place.end
        may_end = full if block.length is not None else count > 0
        allowed = (is_code & ~full.unsqueeze(1)) | (is_end & may_end.unsqueeze(1))  # inside an item, (B, V)
        spent = begun.sum(1) >= self.limits.get(block.name, generated.shape[1] + 1)
        outside = is_code | is_end | ((columns == place.start) & spent.unsqueeze(1))
        banned |= torch.where(is_open.unsqueeze(1), ~allowed, outside)


def _last(found: Tensor) -> Tensor:
    """Position of the last True of every row, -1 where there is none, (B, L) -> (B,)."""
    places = torch.arange(1, found.shape[1] + 1, device=found.device)
    return (found * places).amax(1) - 1 if found.shape[1] else found.new_full((len(found),), -1, dtype=torch.int64)


def box_to_codes(box: Sequence[float], size: tuple[int, int], bins: int = AURORA_PIXEL.size) -> list[int]:
    """A box as four pixel codes x1, y1, x2, y2 of a picture squashed to `bins` x `bins` (AURORA, arXiv 2412.03548).

    Args:
        box: (x1, y1, x2, y2) in pixels of the picture, inside it, x1 <= x2, y1 <= y2.
        size: (H, W) of the picture.
        bins: Codes along a side.

    Raises:
        ValueError: Not a box inside the picture.
    """
    x1, y1, x2, y2 = box
    height, width = size
    if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
        raise ValueError(f"The box {tuple(box)} is no (x1, y1, x2, y2) inside a picture of {height}x{width} (H, W).")
    scaled = (x1 * bins / width, y1 * bins / height, x2 * bins / width, y2 * bins / height)
    return [min(round(v), bins - 1) for v in scaled]


def codes_to_box(
    codes: Sequence[int] | Tensor, size: tuple[int, int], bins: int = AURORA_PIXEL.size
) -> tuple[float, float, float, float]:
    """Inverse of `box_to_codes`, exact to half a bin (one bin at the far edges).

    Raises:
        ValueError: Not four codes of that range.
    """
    found = _as_list(codes)
    if len(found) != 4 or not all(0 <= c < bins for c in found):
        raise ValueError(f"A box is four codes 0..{bins - 1}, got {found}.")
    height, width = size
    return (found[0] * width / bins, found[1] * height / bins, found[2] * width / bins, found[3] * height / bins)


def box_text(codes: Sequence[int] | Tensor, block: Block = AURORA_PIXEL) -> str:
    """A box as AURORA writes it in an answer: (<PIXEL_x1>,<PIXEL_y1>,<PIXEL_x2>,<PIXEL_y2>)."""
    return "(" + ",".join(block.template.format(c) for c in _as_list(codes)) + ")"
