"""Composed scenes: exact answers and boxes, a function of (seed, split, index)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vistok.config import create
from vistok.data.base import fingerprint
from vistok.data.scenes import NUMBERS, Scenes, patches_inside

SCENES = Scenes(count=300, size=96)


def every_scene():
    return [SCENES.scene(i) for i in range(60)]


def test_a_scene_is_a_function_of_seed_split_and_index():
    again = Scenes(count=20, size=96)
    first, second = SCENES.scene(7), again.scene(7)
    assert first.picture.tobytes() == second.picture.tobytes()
    assert (first.things, first.questions) == (second.things, second.questions)
    others = Scenes(size=96, seed=1), Scenes(size=96, split="heldout")
    assert all(o.scene(7).picture.tobytes() != first.picture.tobytes() for o in others)


def test_boxes_hold_exactly_what_was_pasted():
    for scene in every_scene():
        boxes = [box for _, box in scene.things]
        assert all(0 <= box[0] < box[2] <= 96 and 0 <= box[1] < box[3] <= 96 for box in boxes)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], "things overlap"


def test_answers_follow_from_what_is_where():
    for scene in every_scene():
        names = [thing.name for thing, _ in scene.things]
        middle = {thing.name: (box[0] + box[2]) / 2 for thing, box in scene.things}
        for q in scene.questions:
            word = q.text.rstrip("?").split()
            if q.kind == "count":
                assert NUMBERS.index(q.answer) + 1 == len(names) == len(q.boxes)
            elif q.kind == "is":
                assert (word[3] in names) == (q.answer == "yes") == bool(q.boxes)
            elif q.kind == "beside":
                other = word[-1]
                assert (middle[q.answer] < middle[other]) == (word[2] == "left")
            else:
                categories = {thing.name: thing.category for thing, _ in scene.things}
                assert categories[q.answer] == word[1]
                assert q.boxes == tuple(box for thing, box in scene.things if thing.name == q.answer)
            assert q.answer in SCENES.answers(q.kind, q.text)


def test_every_kind_of_question_comes_up():
    assert {q.kind for scene in every_scene() for q in scene.questions} == {"what", "beside", "count", "is"}


def test_text_is_one_question_and_answer_a_line():
    sample, scene = SCENES.read(3), SCENES.scene(3)
    assert sample.text == "\n".join(f"{q.text}\t{q.answer}" for q in scene.questions)
    assert sample.picture.size == (96, 96)


def test_held_out_drawings_are_never_seen_in_training():
    files = {
        which: {t.file for names in s.table.values() for ts in names.values() for t in ts}
        for which, s in (("seen", Scenes()), ("unseen", Scenes(things="unseen")), ("all", Scenes(things="all")))
    }
    assert not files["seen"] & files["unseen"]
    assert files["seen"] | files["unseen"] == files["all"]
    assert len(files["unseen"]) == 29


def test_own_pictures_by_folder(tmp_path):
    for category, name, colour in (("shape", "square", "red"), ("shape", "tile", "blue"), ("thing", "box", "green")):
        (tmp_path / category / name).mkdir(parents=True)
        Image.new("RGB", (20, 30), colour).save(tmp_path / category / name / "1.png")
    scenes = create("dataset", "scenes", objects=str(tmp_path), count=30, size=64)
    answers = {q.answer for i in range(30) for q in scenes.scene(i).questions if q.kind == "what"}
    assert answers == {"square", "tile", "box"}


def test_too_few_things_are_refused(tmp_path):
    (tmp_path / "shape" / "square").mkdir(parents=True)
    Image.new("RGB", (20, 30)).save(tmp_path / "shape" / "square" / "1.png")
    with pytest.raises(ValueError, match="at least two kinds of things"):
        Scenes(objects=str(tmp_path))


def test_an_index_beyond_the_end_is_refused():
    with pytest.raises(IndexError, match="There are 300 scenes"):
        SCENES.scene(300)


def test_the_fingerprint_depends_on_seed_and_size():
    assert len({fingerprint(Scenes(count=9, seed=s, size=z)) for s in (0, 1) for z in (64, 96)}) == 4


def test_patches_lie_where_their_centre_is():
    inside = patches_inside([(10, 0, 40, 20)], (4, 4), 40)
    assert np.flatnonzero(inside).tolist() == [1, 2, 3, 5, 6, 7]
    assert not patches_inside([], (4, 4), 40).any()
