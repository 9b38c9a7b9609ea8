"""Any quantizer fits a tokenizer by one line of its configuration."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.quantizers.zoo import MASKABLE, ZOO


def tokenizer(spec):
    torch.manual_seed(0)
    return vistok.create("tokenizer", "titok_tiny", quantizer=spec)


@pytest.mark.parametrize("kind", MASKABLE)
def test_one_line_changes_the_quantizer_of_a_tokenizer_that_trains(kind):
    model = tokenizer(ZOO[kind])
    optim = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.rand(2, 3, 64, 64)
    for _ in range(2):
        out = model(images)
        optim.zero_grad()
        ((out.images - images).square().mean() + out.quantized.loss).backward()
        optim.step()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    model.eval()
    tokens = model.encode(images)
    if tokens.ids is not None:
        torch.testing.assert_close(model.decode(tokens.ids), model.decode(tokens), rtol=0, atol=1e-5)


def test_ids_of_63_bits_in_groups_decode():
    model = tokenizer({"name": "bsq", "dim": 126, "groups": 2}).eval()
    tokens = model.encode(torch.rand(1, 3, 64, 64))
    assert model.decode(tokens).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="are 0..9223372036854775807, got -1..-1"):
        model.decode(-torch.ones_like(tokens.ids))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "lfq", "dim": 32}, "Group the bits: {name: group_lfq, dim: 32, groups: 4}"),
        ({"name": "vqq"}, "Did you mean 'vq'"),
        ({"name": "lfq", "dims": 8}, "Did you mean 'dim'"),
        ({"name": "lfq"}, "needs this key"),
        ({"name": "multiscale", "codebook_size": 8, "dim": 4, "scales": [1, 4]}, "needs a grid of features"),
    ],
)
def test_a_quantizer_that_does_not_fit_says_what_to_change(spec, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(spec)
