"""Crops and mirror images: which, where, in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from vistok.image import Preprocess
from vistok.tokenize.views import Views


@pytest.fixture
def picture(photos):
    return Image.open(photos[3]).convert("RGB")


def test_one_view_is_the_tokenizers_own_crop(picture):
    preprocess = Preprocess(size=(64, 48))
    (view,) = Views()(picture, preprocess)
    assert torch.equal(torch.from_numpy(view.copy()).permute(2, 0, 1) / 255, preprocess(picture))


def test_flip_adds_the_mirror_image(picture):
    found = Views(augment="flip")(picture, Preprocess(size=(64, 64)))
    assert found.shape == (2, 64, 64, 3)
    assert np.array_equal(found[1], found[0][:, ::-1])


@pytest.mark.parametrize("crop", ["center", "squash"])
def test_ten_crops_are_torchvisions_of_a_larger_crop(picture, crop):
    found = Views(augment="ten-crop", enlarge=1.25)(picture, Preprocess(size=(64, 48), crop=crop))
    large = Preprocess(size=(80, 60), crop=crop).resize(picture)
    want = [np.asarray(p) for p in tv.ten_crop(large, [64, 48])]
    assert len(found) == 10 and all(np.array_equal(a, b) for a, b in zip(found, want))


def test_grey_models_get_one_channel_in_all_three(picture):
    found = Views(augment="flip")(picture, Preprocess(size=(32, 32), channels=1))
    assert np.array_equal(found[..., 0], found[..., 2])


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="none, flip, ten-crop, got 'random'"):
        Views(augment="random")
    with pytest.raises(ValueError, match="1 to 4 times as large, got 1"):
        Views(augment="ten-crop", enlarge=1)
