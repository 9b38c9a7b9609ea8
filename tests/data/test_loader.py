"""What a step is made of depends on seed and step alone."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.augment import Augment
from vistok.data.base import Batch, Sample, keyed
from vistok.data.loader import Cache, DataError, Loader, Order


class Numbers:
    """Sample i is a picture of colour i; those in `broken` cannot be read."""

    def __init__(self, count=10, broken=()):
        self.count, self.broken, self.reads = count, set(broken), 0

    def __len__(self):
        return self.count

    def name(self, index):
        return f"number {index}"

    def read(self, index):
        self.reads += 1
        if index in self.broken:
            raise OSError("torn in two")
        return Sample(Image.new("RGB", (20, 20), (index, index, index)), text=f"{index}", label=index % 2)


def loader(dataset=None, **options) -> Loader:
    options = {"seed": 3, "global_batch": 8, **options}
    return Loader(dataset or Numbers(), Augment(size=(16, 16)), **options)


def joined(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([b.images for b in batches])


def colours(batches: list[Batch]) -> list[int]:
    return (joined(batches)[:, 0, 0, 0] * 255).round().int().tolist()


def test_every_pass_sees_each_sample_once_in_a_new_order():
    order = Order(10, seed=0)
    passes = [[order(e * 10 + i) for i in range(10)] for e in range(3)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1] != passes[2]


def test_order_depends_on_the_seed():
    assert [Order(50, 0)(i) for i in range(50)] != [Order(50, 1)(i) for i in range(50)]


def test_steps_can_start_anywhere():
    straight = [joined(b) for b in loader().steps(0, 6)]
    later = [joined(b) for b in loader().steps(4, 6)]
    assert torch.equal(torch.stack(straight[4:]), torch.stack(later))


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_accumulation_share_out_the_same_samples(world, accumulation):
    whole = [joined(b) for b in loader().steps(0, 3)]
    parts = [list(loader(rank=r, world=world, accumulation=accumulation).steps(0, 3)) for r in range(world)]
    for step in range(3):
        assert torch.equal(whole[step], torch.cat([joined(parts[r][step]) for r in range(world)]))


def test_worker_processes_give_what_the_thread_gives():
    thread = [joined(b) for b in loader().steps(1, 4)]
    workers = [joined(b) for b in loader(workers=2).steps(1, 4)]
    assert torch.equal(torch.stack(thread), torch.stack(workers))


def test_batches_carry_captions_labels_and_positions():
    (batch,) = next(iter(loader().steps(2, 3)))
    assert batch.positions.tolist() == list(range(16, 24))
    assert list(batch.text) == [str(c) for c in colours([batch])]
    assert batch.labels.tolist() == [c % 2 for c in colours([batch])]


def test_draws_belong_to_samples_not_to_batches():
    whole = next(iter(loader().steps(0, 1)))[0].uniform("length", 3)
    half = next(iter(loader(rank=1, world=2).steps(0, 1)))[0].uniform("length", 3)
    assert torch.equal(whole[4:], half)
    assert not torch.equal(whole, next(iter(loader().steps(0, 1)))[0].uniform("other", 3))


def test_broken_sample_is_named_once_counted_and_replaced():
    source = loader(Numbers(broken=[4]))
    with pytest.warns(UserWarning, match="Skipped from now on: number 4: torn in two") as seen:
        steps = [colours(b) for b in source.steps(0, 10)]
    assert len(seen) == 1
    assert source.skipped == {"number 4": 8}
    assert all(4 not in step and len(step) == 8 for step in steps)


def test_replacement_is_the_same_for_any_number_of_processes():
    with warnings.catch_warnings(action="ignore"):
        whole = colours(next(iter(loader(Numbers(broken=[1, 2])).steps(0, 1))))
        halves = [colours(next(iter(loader(Numbers(broken=[1, 2]), rank=r, world=2).steps(0, 1)))) for r in (0, 1)]
    assert whole == halves[0] + halves[1]


def test_nothing_readable_is_an_error_with_its_cause():
    with pytest.raises(DataError, match="None of the 3 samples.*torn in two"):
        next(iter(loader(Numbers(3, broken=[0, 1, 2])).steps(0, 1)))


def test_indivisible_batch_is_refused():
    with pytest.raises(DataError, match="multiple of 6"):
        loader(world=3, accumulation=2)


def test_pictures_are_decoded_once_while_memory_lasts():
    dataset = Numbers()
    list(loader(dataset).steps(0, 10))
    assert dataset.reads == 10


def test_cache_stops_at_its_size():
    dataset, cache = Numbers(), Cache(20 * 20 * 4 * 2 / 2**20)
    for index in (0, 1, 2, 0, 1, 2):
        cache.read(dataset, index)
    assert dataset.reads == 4


def test_closing_ends_the_thread():
    steps = loader().steps(0, 1000)
    next(steps)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name == "vistok-data"]


def test_waiting_is_measured():
    source = loader()
    list(source.steps(0, 2))
    assert source.waited > 0


def test_keyed_numbers_differ_by_stream_and_position_and_repeat():
    first = keyed(1, "a", 2, 3).random(4)
    assert np.array_equal(first, keyed(1, "a", 2, 3).random(4))
    others = [keyed(2, "a", 2, 3), keyed(1, "b", 2, 3), keyed(1, "a", 3, 2), keyed(1, "a", 2)]
    assert not any(np.array_equal(first, o.random(4)) for o in others)
