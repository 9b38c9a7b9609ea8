"""Crops and flips."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vistok.data.augment import Augment
from vistok.data.base import keyed
from vistok.image import Preprocess


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x], -1).astype(np.uint8))


def cuts(augment: Augment, picture: Image.Image, count: int = 50) -> np.ndarray:
    return np.stack([augment(picture, keyed(0, "augment", i)) for i in range(count)]).astype(float)


@pytest.mark.parametrize("crop", ["random", "resized", "center"])
@pytest.mark.parametrize("shape", [(300, 200), (20, 300), (8, 8)])
def test_any_picture_gives_the_wanted_size(crop, shape):
    cut = Augment(size=(32, 48), crop=crop)(ramp(*shape), keyed(0, "augment", 1))
    assert cut.shape == (32, 48, 3) and cut.dtype == np.uint8


def test_random_crop_keeps_the_whole_shorter_edge():
    found = cuts(Augment(size=(32, 32), flip=0.0), ramp(128, 64))
    green = found[..., 1]
    assert (green[:, 0].mean(-1) < 8).all() and (green[:, -1].mean(-1) > 247).all()


def test_random_crop_wanders_along_the_longer_edge():
    left = cuts(Augment(size=(32, 32), flip=0.0), ramp(128, 64))[:, :, 0, 0].mean(-1)
    assert left.min() < 10 and left.max() > 115


def test_resized_crop_covers_the_asked_share_of_the_area():
    augment = Augment(size=(32, 32), crop="resized", scale=(0.25, 0.5), ratio=(1.0, 1.0), flip=0.0)
    found = cuts(augment, ramp(256, 256))
    side = (found[:, :, -1, 0] - found[:, :, 0, 0]).mean(-1) / 255 * 32 / 31
    assert 0.24 < (side**2).min() < (side**2).max() < 0.51


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_flip_has_its_probability(flip, share):
    found = cuts(Augment(size=(16, 16), flip=flip), ramp(64, 64), 200)
    assert abs((found[:, :, 0, 0] > found[:, :, -1, 0]).all(-1).mean() - share) < 0.1


def test_center_is_the_preprocessing_of_evaluation():
    picture = ramp(90, 50)
    cut = Augment(size=(32, 32), crop="center", flip=0.0)(picture, keyed(0, "augment", 3))
    assert np.array_equal(cut, np.asarray(Preprocess(size=(32, 32)).resize(picture)))
