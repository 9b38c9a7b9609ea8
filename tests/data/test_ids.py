"""Tokens from shards: random access, order, views, what a batch carries."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

import vistok
from tests.tokenize.test_job import Colours, job, titok
from vistok.data.augment import Augment
from vistok.data.base import TokenBatch, TokenDataset, fingerprint
from vistok.data.loader import DataError, Loader
from vistok.data.manifest import ManifestError
from vistok.data.token_shards import ShardError
from vistok.tokenize.views import Views


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """22 pictures in 4 shards, two views of each, class and caption."""
    out = tmp_path_factory.mktemp("ids")
    job(out, Colours(), views=Views(augment="flip"))
    return out


def ids(folder, **options):
    return vistok.create("dataset", "ids", path=str(folder), **options)


def loader(data, **options) -> Loader:
    return Loader(data, None, **{"seed": 3, "global_batch": 8, **options})


def steps(source: Loader, start: int, stop: int) -> list[torch.Tensor]:
    return [torch.cat([b.tokens.ids for b in batches]) for batches in source.steps(start, stop)]


def test_it_is_a_data_set_of_tokens(folder):
    assert isinstance(ids(folder), TokenDataset)
    assert not isinstance(Colours(), TokenDataset)


def test_a_batch_carries_tokens_classes_captions_and_positions(folder):
    (batch,) = next(iter(loader(ids(folder)).steps(2, 3)))
    assert isinstance(batch, TokenBatch)
    assert batch.positions.tolist() == list(range(16, 24)) and batch.seed == 3
    assert batch.tokens.ids.shape == (8, 4) and batch.tokens.vocab == (256,)
    numbers = [int(text.removeprefix("noise ")) for text in batch.text]
    assert batch.labels.tolist() == [n % 3 for n in numbers]
    by_number = {i: ids(folder).read(i).tokens.ids for i in range(22)}
    for n, row in zip(numbers, batch.tokens.ids):
        assert any(torch.equal(row, view) for view in by_number[n])
    assert batch.uniform("length", 2).shape == (8, 2)


def test_every_pass_sees_each_picture_once_in_a_new_order(folder):
    source = loader(ids(folder), global_batch=11)
    text = [[t for b in batches for t in b.text] for batches in source.steps(0, 4)]
    passes = [text[0] + text[1], text[2] + text[3]]
    assert all(sorted(p) == sorted(f"noise {i}" for i in range(22)) for p in passes)
    assert passes[0] != passes[1]


def test_steps_can_start_anywhere_and_read_nothing_before(folder):
    straight = steps(loader(ids(folder)), 0, 12)
    data = ids(folder)
    later = steps(loader(data), 10, 11)
    assert torch.equal(later[0], straight[10])
    assert len(data._open) <= 4
    one = ids(folder)
    one.read(21)
    assert list(one._open) == [3]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 4), (2, 2)])
def test_processes_and_accumulation_share_out_the_same_samples(folder, world, accumulation):
    whole = steps(loader(ids(folder)), 0, 3)
    parts = [steps(loader(ids(folder), rank=r, world=world, accumulation=accumulation), 0, 3) for r in range(world)]
    assert all(torch.equal(whole[i], torch.cat([part[i] for part in parts])) for i in range(3))


def test_worker_processes_give_what_the_thread_gives(folder):
    assert torch.equal(
        torch.cat(steps(loader(ids(folder)), 1, 4)), torch.cat(steps(loader(ids(folder), workers=2), 1, 4))
    )


def test_views_are_drawn_and_all_of_them_come_up(folder):
    seen = torch.cat(steps(loader(ids(folder), global_batch=22), 0, 6)).unique(dim=0)
    every = torch.cat([ids(folder).read(i).tokens.ids for i in range(22)]).unique(dim=0)
    assert len(seen) > 0.9 * len(every)


def test_first_takes_the_first_view_only(folder):
    data = ids(folder, views="first")
    assert len(data.read(4).tokens) == 1
    assert torch.equal(data.read(4).tokens.ids, ids(folder).read(4).tokens.ids[:1])
    first = torch.cat([data.read(i).tokens.ids for i in range(22)])
    got = torch.cat(steps(loader(data, global_batch=22), 0, 1))
    assert sorted(got.tolist()) == sorted(first.tolist())


def test_all_makes_each_view_a_sample(folder):
    data = ids(folder, views="all")
    assert len(data) == 44
    assert data.name(9) == "colour 4#1"
    assert torch.equal(data.read(9).tokens.ids, ids(folder).read(4).tokens.ids[1:])
    got = torch.cat(steps(loader(data, global_batch=44), 0, 1))
    every = torch.cat([ids(folder).read(i).tokens.ids for i in range(22)])
    assert sorted(got.tolist()) == sorted(every.tolist())


def test_a_sample_that_is_not_there_is_an_index_error(folder):
    with pytest.raises(IndexError, match="There are 22 samples, number 22 was asked for"):
        ids(folder).read(22)


def test_it_goes_to_other_processes_without_its_files(folder):
    data = ids(folder)
    data.read(0)
    copy = pickle.loads(pickle.dumps(data))
    assert copy._open == {} and torch.equal(copy.read(3).tokens.ids, data.read(3).tokens.ids)


def test_fingerprint_is_of_the_content(folder, tmp_path):
    job(tmp_path, Colours(), views=Views(augment="flip"))
    assert fingerprint(ids(folder)) == fingerprint(ids(tmp_path))
    assert fingerprint(ids(folder)) != fingerprint(ids(folder, views="all"))


def test_tokens_of_another_tokenizer_are_refused(folder):
    tokenizer = titok()
    assert ids(folder, model_id=tokenizer.model_id)
    with pytest.raises(ManifestError, match=rf"tokens of titok {tokenizer.model_id}; the tokenizer given is 00000000"):
        ids(folder, model_id="00000000")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no manifest\.json: it is no folder of tokens"),
        ("{", "is not valid JSON"),
        ("{}", "is not the manifest of a folder of tokens"),
        ('{"format": "vistok-ids", "version": 9}', "is of version 9; this vistok reads version 1"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=message):
        ids(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "webdataset"])
def test_garbage_of_the_right_size_is_named(tmp_path, form):
    job(tmp_path, Colours(3), format=form)
    (file,) = tmp_path.glob("shard*")
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ShardError, match=f"{file.name} is damaged or is no shard of tokens"):
        ids(tmp_path).read(0)


def test_pictures_need_a_way_to_cut_them():
    with pytest.raises(DataError, match="needs `augment`"):
        Loader(Colours(), None, seed=0, global_batch=2)
    assert Loader(Colours(), Augment(size=(8, 8)), seed=0, global_batch=2)


def test_a_batch_keeps_lengths_and_codes(tmp_path):
    torch.manual_seed(0)
    tokenizer = vistok.create("tokenizer", "titok_tiny", image_size=32, quantizer={"name": "gaussian", "dim": 4}).eval()
    job(tmp_path, Colours(5), tokenizer, codes="bfloat16")
    (batch,) = next(iter(loader(ids(tmp_path), global_batch=5).steps(0, 1)))
    assert batch.tokens.ids is None and batch.tokens.codes.shape == (5, tokenizer.num_tokens, 4)
    assert tokenizer.decode(dataclasses.replace(batch.tokens)).shape == (5, 3, 32, 32)
