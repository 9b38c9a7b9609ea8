"""The benchmark compares like with like."""

from __future__ import annotations

import pytest
import torch

import vistok
from tests.fill import image
from vistok.evaluate.bench_tokenizer import run, transformer_flops
from vistok.evaluate.plain import PlainTiTok
from vistok.layers.transformer import Transformer


@pytest.mark.parametrize("name", ["titok_tiny", "titok_two_stage_tiny"])
def test_plain_implementation_gives_the_same_ids_and_pictures(name):
    tok = vistok.create("tokenizer", name).eval()
    plain = PlainTiTok(tok).eval()
    x = image(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_features(x), tok.encode_features(x), atol=1e-5, rtol=1e-4)
        ids = tok.encode(x).ids
        torch.testing.assert_close(plain.decode(ids), tok.decode(ids), atol=1e-4, rtol=1e-4)


def test_flops_equal_the_counted_ones():
    from torch.utils.flop_counter import FlopCounterMode

    model = Transformer(32, depth=2, num_heads=4)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(1, 10, 32), rows=slice(6, None))
    assert transformer_flops(model, 10, 4) == counter.get_total_flops()


def test_benchmark_reports_every_operation_in_both_precisions():
    result = run("titok_tiny", batch=1, rounds=1)
    assert [(r["operation"], r["precision"]) for r in result.rows] == [
        ("encode", "float32"),
        ("decode", "float32"),
        ("encode", "bf16"),
        ("decode", "bf16"),
    ]
    assert 0.5 < result.equal_ids <= 1


def test_models_without_ids_are_refused():
    with pytest.raises(ValueError, match="takes TiTok models with ids"):
        run("maskgit_vqgan_tiny")
