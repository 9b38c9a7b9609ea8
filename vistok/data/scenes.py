"""Composed scenes: drawn things on photographs, with questions whose answers and evidence boxes are exact."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from vistok.data.base import Sample, keyed
from vistok.data.bundled import Photos
from vistok.image import find_pictures
from vistok.registry import register

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
BUNDLED = Path(__file__).parent / "objects"
NUMBERS = ("one", "two", "three", "four")
PLURALS = {"fish": "fish", "bus": "buses", "strawberry": "strawberries", "butterfly": "butterflies", "grapes": "grapes"}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A picture that scenes are composed of.

    Attributes:
        file: RGBA picture.
        name: What it shows, one word: an answer.
        category: What kind of thing it is: `What animal is in the picture?`
    """

    file: Path
    name: str
    category: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: `what` (names a thing by its category), `beside` (what is left or right of a thing), `count`, `is`.
        text: The question.
        answer: One word.
        boxes: Where its evidence lies: left, top, right, bottom in pixels; empty for what is not there.
    """

    kind: str
    text: str
    answer: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture with its questions.

    Attributes:
        picture: RGB, (size, size).
        things: What it shows, from left to right, with the box of each.
        questions: In random order.
    """

    picture: Image
    things: tuple[tuple[Thing, Box], ...]
    questions: tuple[Question, ...]


@register("dataset", "scenes")
class Scenes:
    """Drawn things pasted on photographs; scene `index` is a function of (seed, split, index).

    A scene shows one thing, two or three of different categories side by side, or up to four of one kind. Its questions
    are the sample's text, one `question<tab>answer` a line. Nothing overlaps, so boxes are exact. Mirroring would make
    answers wrong: set `flip: 0` and `crop: center`.

    Args:
        count: Number of scenes.
        size: Side in pixels.
        split: Photographs behind them: `train`, or the bundled set's `heldout` ones. Share-alike photographs are left
            out, so that what is made from scenes may be passed on.
        things: Drawings of training (`seen`), those held out of it (`unseen`), or `all`. Without held-out ones (a
            folder of your own) all three are the same.
        objects: A folder of class folders with pictures (of transparent background, at best), `CATEGORY/NAME/*.png`;
            null for the bundled 29 things.
        seed: Keys everything.

    Raises:
        ValueError: Fewer than two things to compose, or none of a category.
        FileNotFoundError: No such folder.
    """

    def __init__(
        self,
        *,
        count: int = 10_000,
        size: int = 168,
        split: Literal["train", "heldout"] = "train",
        things: Literal["seen", "unseen", "all"] = "seen",
        objects: str | None = None,
        seed: int = 0,
    ) -> None:
        self.count, self.size, self.split, self.seed = count, size, split, seed
        found = _bundled(things) if objects is None else _folder(Path(objects).expanduser())
        self.table: dict[str, dict[str, list[Thing]]] = {}  # category -> name -> pictures
        for thing in found:
            self.table.setdefault(thing.category, {}).setdefault(thing.name, []).append(thing)
        if sum(map(len, self.table.values())) < 2:
            raise ValueError(
                f"Scenes need at least two kinds of things; {objects or BUNDLED} has {len(found)} pictures."
            )
        self.photos = Photos(split=split, permissive=True)

    def __len__(self) -> int:
        """Number of scenes."""
        return self.count

    def name(self, index: int) -> str:
        """What the scene is called; everything it depends on."""
        return f"scene {self.split} {self.seed} {self.size} {index}"

    def read(self, index: int) -> Sample:
        """A scene's picture with its questions and answers as text."""
        scene = self.scene(index)
        return Sample(picture=scene.picture, text="\n".join(f"{q.text}\t{q.answer}" for q in scene.questions))

    def scene(self, index: int) -> Scene:
        """Compose scene `index`."""
        if not 0 <= index < self.count:
            raise IndexError(f"There are {self.count} scenes; got {index}.")
        rng = keyed(self.seed, f"scenes/{self.split}", index)
        picture = self._background(rng)
        if rng.random() < 0.25:
            things, boxes = self._crowd(rng)
        else:
            things, boxes = self._row(rng)
        placed = []
        for thing, box in zip(things, boxes):
            placed.append((thing, _paste(picture, thing, box, rng)))
        questions = self._questions(placed, rng)
        order = rng.permutation(len(questions))
        return Scene(picture=picture, things=tuple(placed), questions=tuple(questions[i] for i in order))

    def answers(self, kind: str, text: str) -> list[str]:
        """Every answer that a question of this kind could have: what chance guesses among."""
        if kind == "is":
            return ["yes", "no"]
        if kind == "count":
            return list(NUMBERS)
        category = next((c for c in self.table if f"What {c} " in text), None)
        return sorted(name for c, names in self.table.items() if category in (None, c) for name in names)

    def _background(self, rng: np.random.Generator) -> Image:
        from PIL import Image, ImageOps

        draws = rng.random(5)
        photo = self.photos.read(int(draws[0] * len(self.photos))).picture
        side = min(photo.size) * (0.6 + 0.4 * draws[1])
        left, top = (photo.width - side) * draws[2], (photo.height - side) * draws[3]
        cut = photo.resize((self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return ImageOps.mirror(cut) if draws[4] < 0.5 else cut

    def _row(self, rng: np.random.Generator) -> tuple[list[Thing], list[Box]]:
        """One to three things of different categories, each in its own column."""
        count = min(int(rng.choice([1, 2, 3], p=[0.15, 0.5, 0.35])), len(self.table))
        categories = [list(self.table)[i] for i in rng.permutation(len(self.table))[:count]]
        things = [self._pick(rng, str(rng.choice(list(self.table[c]))), c) for c in categories]
        width = self.size // count
        low, high = int(0.28 * self.size), min(width, int(0.7 * self.size))
        return things, [self._inside(rng, (i * width, 0, (i + 1) * width, self.size), low, high) for i in range(count)]

    def _crowd(self, rng: np.random.Generator) -> tuple[list[Thing], list[Box]]:
        """One to four things of one name, in cells of a 2 x 2 grid."""
        category = str(rng.choice(list(self.table)))
        name = str(rng.choice(list(self.table[category])))
        count = int(rng.integers(1, len(NUMBERS) + 1))
        half = self.size // 2
        cells = sorted(rng.permutation(4)[:count].tolist(), key=lambda cell: (cell % 2, cell))
        boxes = []
        for cell in cells:
            x, y = cell % 2 * half, cell // 2 * half
            boxes.append(self._inside(rng, (x, y, x + half, y + half), int(0.28 * self.size), int(0.42 * self.size)))
        return [self._pick(rng, name, category) for _ in range(count)], boxes

    def _pick(self, rng: np.random.Generator, name: str, category: str) -> Thing:
        pictures = self.table[category][name]
        return pictures[int(rng.integers(len(pictures)))]

    def _inside(self, rng: np.random.Generator, room: Box, low: int, high: int) -> Box:
        side = int(rng.integers(min(low, high), high + 1))
        left = room[0] + int(rng.integers(0, room[2] - room[0] - side + 1))
        top = room[1] + int(rng.integers(0, room[3] - room[1] - side + 1))
        return left, top, left + side, top + side

    def _questions(self, placed: list[tuple[Thing, Box]], rng: np.random.Generator) -> list[Question]:
        found = []
        names = [thing.name for thing, _ in placed]
        crowd = len(set(names)) < len(names) or len(names) == 1
        every = tuple(box for _, box in placed)
        for thing, box in placed if not crowd else placed[:1]:
            boxes = every if crowd else (box,)
            text = f"What {thing.category} is in the picture?"
            found.append(Question(kind="what", text=text, answer=thing.name, boxes=boxes))
        if crowd:
            text = f"How many {_plural(names[0])} are in the picture?"
            found.append(Question(kind="count", text=text, answer=NUMBERS[len(names) - 1], boxes=every))
        if len(placed) == 2 and not crowd:
            for side, asked, told in (("left", 1, 0), ("right", 0, 1)):
                text = f"What is {side} of the {names[asked]}?"
                found.append(Question(kind="beside", text=text, answer=names[told], boxes=every))
        present = bool(rng.random() < 0.5)
        absent = sorted(n for things in self.table.values() for n in things if n not in names)
        name = names[0] if present or not absent else str(rng.choice(absent))
        boxes = tuple(box for thing, box in placed if thing.name == name)
        text = f"Is there {_article(name)} {name} in the picture?"
        found.append(Question(kind="is", text=text, answer="yes" if name in names else "no", boxes=boxes))
        return found


def patches_inside(boxes: Sequence[Box], grid: tuple[int, int], size: int) -> np.ndarray:
    """Patches whose centre lies in one of the boxes, bool (h * w,), row by row.

    Args:
        boxes: Left, top, right, bottom in pixels of a square picture.
        grid: Patches per column and row, (h, w).
        size: Side of the picture.
    """
    y = (np.arange(grid[0]) + 0.5) * size / grid[0]
    x = (np.arange(grid[1]) + 0.5) * size / grid[1]
    inside = np.zeros(grid, dtype=bool)
    for left, top, right, bottom in boxes:
        inside |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
    return inside.ravel()


def _paste(picture: Image, thing: Thing, box: Box, rng: np.random.Generator) -> Box:
    """Put a thing into a box, in its own proportions, perhaps mirrored; the box it really takes."""
    from PIL import Image, ImageOps

    drawn = _opened(thing.file)
    scale = min((box[2] - box[0]) / drawn.width, (box[3] - box[1]) / drawn.height)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    drawn = drawn.resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        drawn = ImageOps.mirror(drawn)
    left, top = (box[0] + box[2] - size[0]) // 2, (box[1] + box[3] - size[1]) // 2
    picture.paste(drawn, (left, top), drawn)
    return left, top, left + size[0], top + size[1]


@functools.lru_cache(maxsize=512)
def _opened(file: Path) -> Image:
    from PIL import Image

    with Image.open(file) as opened:
        return opened.convert("RGBA")


def _bundled(which: str) -> list[Thing]:
    rows = [json.loads(line) for line in (BUNDLED / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = [row for row in rows if which == "all" or row["held_out"] == (which == "unseen")]
    return [Thing(file=BUNDLED / row["file"], name=row["name"], category=row["category"]) for row in wanted]


def _folder(folder: Path) -> list[Thing]:
    files = find_pictures(folder)
    return [Thing(file=f, name=f.parent.name, category=f.parent.parent.name) for f in files if f.parent != folder]


def _plural(name: str) -> str:
    return PLURALS.get(name, f"{name}s")


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"
