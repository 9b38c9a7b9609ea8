"""k-NN and linear probe: classifiers against hand-made answers, features at every point, real data in the slow tier."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vistok
from tests.evaluate.test_run import Cells
from vistok.data.base import Sample
from vistok.evaluate.classify import choose_penalty, fit_linear, nearest_neighbours
from vistok.evaluate.probe import labelled_folder, probe

FETCH = "python recipes/get_data.py --set {name} DIR, then VISTOK_DATA=DIR"


def blobs(per_class: int, classes: int = 3, width: int = 4, spread: float = 0.3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(per_class * classes) % classes
    centres = 3 * torch.eye(classes, width)
    return centres[labels] + spread * torch.randn(len(labels), width, generator=generator), labels


def test_one_neighbour_is_the_nearest_direction():
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1])
    assert nearest_neighbours(train, labels, torch.tensor([[5.0, 4.0], [0.1, 0.2]]), classes=2)[0].tolist() == [0, 1]


def test_more_votes_win_over_nearer_ones():
    angles = torch.tensor([0.0, 0.5, 0.6])
    train = torch.stack([angles.cos(), angles.sin()], 1)
    found = nearest_neighbours(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), classes=2)
    assert found[:, 0].tolist() == [0, 0, 1]  # of one vote each the nearer counts


def test_a_small_training_set_gives_fewer_neighbours():
    features, labels = blobs(2)
    assert nearest_neighbours(features, labels, features[:4], classes=3, most=20).shape == (6, 4)


@pytest.mark.parametrize("count", [1, 1500])
def test_neighbours_do_not_depend_on_the_batch_of_queries(count):
    features, labels = blobs(20)
    queries, _ = blobs(500, seed=1, spread=2.0)
    whole = nearest_neighbours(features, labels, queries, classes=3)
    assert torch.equal(nearest_neighbours(features, labels, queries[:count], classes=3), whole[:, :count])


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_linear_probe_ends_where_the_gradient_vanishes(penalty):
    features, labels = blobs(30, spread=2.0)
    found = fit_linear(features, labels, classes=3, penalty=penalty)
    weight, bias = found.weight.requires_grad_(), found.bias.requires_grad_()
    x = (features.double() - features.double().mean(0)) / features.double().std(0, unbiased=False)
    loss = F.cross_entropy(x @ weight + bias, labels) + 0.5 * penalty * weight.square().sum()
    assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(loss, [weight, bias]))


def test_linear_probe_does_not_depend_on_where_it_starts():
    features, labels = blobs(30, spread=2.0)
    other = fit_linear(features, labels, classes=3, penalty=1.0)
    a, b = (fit_linear(features, labels, classes=3, penalty=1e-2, start=s) for s in (None, other))
    torch.testing.assert_close(a.weight, b.weight, atol=1e-3, rtol=0)


def test_scale_and_offset_of_a_feature_do_not_matter():
    features, labels = blobs(30, spread=2.0)
    moved = features * torch.tensor([1e3, 1.0, 1e-3, 5.0]) + torch.tensor([0.0, 100.0, 0.0, -7.0])
    a, b = (fit_linear(x, labels, classes=3, penalty=1e-2)(x) for x in (features, moved))
    assert torch.equal(a, b)


def test_a_constant_feature_is_harmless():
    features, labels = blobs(10)
    features = torch.cat([features, torch.full((len(features), 1), 0.1)], 1)
    found = fit_linear(features, labels, classes=3, penalty=1e-3)
    assert torch.equal(found(features), labels) and torch.isfinite(found.weight).all()


def test_noise_features_ask_for_a_strong_penalty():
    features, labels = blobs(10, spread=0.1)
    noisy = torch.cat([features, 3 * torch.randn(len(features), 100)], 1)
    penalty, scores = choose_penalty(noisy, labels, classes=3)
    assert scores[penalty] == max(scores.values()) and penalty == max(p for p in scores if scores[p] == scores[penalty])


def picture(path: Path, level: int, stripes: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    one = Image.new("L", (64, 64), level)
    if stripes:
        one.paste(255 - level, (0, 0, 64, 32))
    one.save(path)


@pytest.fixture
def folder(tmp_path):
    """Dark and light pictures in nested folders."""
    for i in range(20):
        picture(tmp_path / "dark" / "inner" / f"{i}.png", 20 + i)
        picture(tmp_path / "light" / f"{i}.png", 200 + i)
    return tmp_path


def test_a_folder_without_parts_is_split_by_name(folder):
    train, test = labelled_folder(folder)
    assert len(train) + len(test) == 40 and 2 <= len(test) <= 16
    before = {test.name(i) for i in range(len(test))}
    picture(folder / "light" / "new.png", 220)
    _, again = labelled_folder(folder)
    assert before <= {again.name(i) for i in range(len(again))}


def test_outermost_folders_are_the_classes(folder):
    train, _ = labelled_folder(folder)
    assert train.classes == ["dark", "light"]
    assert {train.classes[train.read(i).label] for i in range(len(train)) if "inner" in train.name(i)} == {"dark"}


@pytest.mark.parametrize("part", ["test", "val"])
def test_parts_of_a_folder_are_taken_as_they_are(tmp_path, part):
    for name, count in (("train", 3), (part, 2)):
        for label in ("a", "b"):
            for i in range(count):
                picture(tmp_path / name / label / f"{i}.png", 9)
    assert [len(d) for d in labelled_folder(tmp_path)] == [6, 4]


def test_a_folder_of_one_class_is_refused(tmp_path):
    picture(tmp_path / "only" / "1.png", 3)
    with pytest.raises(ValueError, match="at least two, .* has 1 classes, 1 pictures to train and 0"):
        labelled_folder(tmp_path)


@pytest.mark.parametrize("pool", ["mean", "flat"])
@pytest.mark.parametrize("point", ["features", "codes"])
def test_brightness_is_read_off_grey_cells(folder, point, pool):
    found = probe(Cells(), *labelled_folder(folder), point=point, pool=pool)
    assert found.linear == 1.0 and found.tokens == 64 and found.width == (1 if pool == "mean" else 64)
    assert found.per_class == {"dark": 1.0, "light": 1.0}


def test_direction_of_one_positive_number_tells_nothing(folder):
    found = probe(Cells(), *labelled_folder(folder), pool="mean")
    assert found.knn[1] < 1.0 == found.linear  # cosine similarity has no sense of length


def test_result_is_json_with_its_protocol_and_the_same_twice(folder):
    sets = labelled_folder(folder)
    model = vistok.create("tokenizer", "titok_tiny")
    one, two = (probe(model, *sets, batch=b, point="codes").to_dict() for b in (7, 7))
    assert json.loads(json.dumps(one)) == json.loads(json.dumps(two))
    assert set(one["knn"]) == {str(k) for k in range(1, 21)} and set(one["intervals"]) >= {"linear", "knn_20"}
    facts = one["protocol"]
    assert facts["settings"]["point"] == "codes" and facts["data"]["test"]["sha256"] and facts["model"]["sha256"]


def test_tokenizer_is_left_in_its_mode(folder):
    model = vistok.create("tokenizer", "titok_tiny").train()
    probe(model, *labelled_folder(folder), limit=6)
    assert model.training


@pytest.mark.parametrize("point", ["encoder", "decoder", "quantizer"])
def test_submodules_of_encoder_and_decoder_are_points(folder, point):
    model = vistok.create("tokenizer", "maskgit_vqgan_tiny")
    if point == "quantizer":
        with pytest.raises(ValueError, match="'quantizer' gives Quantized, not"):
            probe(model, *labelled_folder(folder), point=point, limit=6)
    else:
        found = probe(model, *labelled_folder(folder), point=point, limit=6)
        assert found.tokens > 1 and found.pictures == {"train": 6, "test": 6}


def test_published_point_is_where_the_authors_look(folder):
    tok = vistok.create("tokenizer", "gigatok_tiny")
    sets = labelled_folder(folder)
    found, named = (probe(tok, *sets, point=point, limit=6) for point in ("published", "to_tokens.norm_post"))
    assert (found.linear, found.knn) == (named.linear, named.knn)
    assert found.to_dict()["protocol"]["settings"]["point"] == "to_tokens.norm_post"
    assert vistok.create("tokenizer", "titok_tiny").probe_point == "features"


def test_unknown_point_names_the_nearest(folder):
    with pytest.raises(ValueError, match="'encodr' is neither 'features', 'codes' nor a submodule. Did you mean 'enc"):
        probe(vistok.create("tokenizer", "titok_tiny"), *labelled_folder(folder), point="encodr")


def test_num_tokens_goes_with_codes_alone(folder):
    with pytest.raises(ValueError, match="goes with point='codes', not 'features'"):
        probe(Cells(), *labelled_folder(folder), num_tokens=4)


def test_broken_picture_is_skipped_and_named(folder):
    (folder / "light" / "broken.png").write_bytes(b"no picture")
    found = probe(Cells(), *labelled_folder(folder))
    assert [Path(p).name for p in found.skipped] == ["broken.png"]
    assert sum(found.pictures.values()) == 40


class Unlabelled:
    def __len__(self):
        return 3

    def name(self, index):
        return f"picture {index}"

    def read(self, index):
        return Sample(picture=Image.new("RGB", (64, 64)))


def test_pictures_without_classes_are_refused():
    with pytest.raises(ValueError, match="picture 0 has no class. Build the data set with labels=true"):
        probe(Cells(), Unlabelled(), Unlabelled())


def test_sets_of_different_classes_are_refused(folder):
    train, _ = labelled_folder(folder)
    picture(folder / "grey" / "1.png", 100)
    picture(folder / "grey" / "2.png", 100)
    _, test = labelled_folder(folder)
    with pytest.raises(ValueError, match=r"different classes \(2 and 3; only one has grey\)"):
        probe(Cells(), train, test)


def real(name: str) -> Path:
    root = os.environ.get("VISTOK_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs real pictures: {FETCH.format(name=name)}")
    return Path(root) / name


@pytest.mark.slow
def test_clothes_are_told_apart_by_their_grey_cells():
    found = probe(Cells(), *labelled_folder(real("fashion")), pool="flat", limit=4000, batch=256)
    assert found.classes == 10 and found.chance < 0.12
    assert found.linear > 0.75 and found.knn[5] > 0.78
    assert found.per_class["trouser"] > 0.85 and found.per_class["shirt"] < 0.6  # as everybody finds


@pytest.mark.slow
def test_mean_grey_tells_clothes_apart_a_little():
    found = probe(Cells(), *labelled_folder(real("fashion")), pool="mean", limit=4000, batch=256)
    assert 2 * found.chance < found.linear < 0.5


@pytest.mark.slow
def test_stamps_are_told_apart_better_than_by_chance():
    found = probe(Cells(), *labelled_folder(real("stamps")), pool="flat", batch=64)
    assert found.classes > 10
    assert found.knn[5] > found.chance
