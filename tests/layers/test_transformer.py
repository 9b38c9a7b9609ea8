"""Transformer blocks against their definitions."""

from __future__ import annotations

import pytest
import torch

from vistok.layers.position import resize_table
from vistok.layers.transformer import Transformer


@pytest.mark.parametrize("rows", [slice(3, None), slice(1, 5), slice(0, 1)])
def test_asking_for_some_rows_equals_computing_all(rows):
    model = Transformer(32, depth=3, num_heads=4).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x, rows=rows), model(x)[:, rows])


def test_block_matches_torch_multihead_attention():
    from vistok.layers.attention import Attention

    ours = Attention(32, 4)
    plain = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    plain.in_proj_weight.data.copy_(ours.qkv.weight)
    plain.in_proj_bias.data.copy_(ours.qkv.bias)
    plain.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x), plain(x, x, x)[0], atol=1e-6, rtol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width of 30 cannot be split into 4 heads"):
        Transformer(30, depth=1, num_heads=4)


def test_resized_table_keeps_the_class_row_and_the_corners():
    table = torch.randn(1 + 16, 8)
    wide = resize_table(table, (4, 4), (4, 8), prefix=1)
    assert wide.shape == (33, 8)
    assert torch.equal(wide[0], table[0])


def test_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="does not hold a grid of 4x5"):
        resize_table(torch.randn(17, 8), (4, 5), (8, 8), prefix=1)
