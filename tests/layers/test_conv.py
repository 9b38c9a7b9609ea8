"""Convolutional layers against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vistok.layers.conv import UpsampleConv2d, to_map, to_sequence


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (2, 5, 3, 4), (1, 5, 8, 2)])
def test_upsampling_convolution_equals_nearest_then_convolution(shape):
    layer = UpsampleConv2d(5, 7).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), layer.weight, layer.bias, padding=1)
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(wanted)
    parameters = [x, layer.weight, layer.bias]
    for a, b in zip(
        torch.autograd.grad((found * probe).sum(), parameters), torch.autograd.grad((wanted * probe).sum(), parameters)
    ):
        torch.testing.assert_close(a, b)


def test_sequence_and_map_are_inverse_and_share_memory():
    x = torch.randn(2, 12, 5)
    feature_map = to_map(x, (3, 4))
    assert feature_map.data_ptr() == x.data_ptr()
    assert feature_map.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_sequence(feature_map), x)
    assert torch.equal(feature_map[0, :, 1, 2], x[0, 1 * 4 + 2])
