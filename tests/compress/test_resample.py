"""Trained compressors against the official modules, and what follows from windows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.fill import fill
from vistok.compress.resample import QueCCCompressor, TokenPackerCompressor, projector, to_windows
from vistok.compress.resample_official import QUECC, TOKENPACKER


def _noise(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def _official(case, rules):
    state = {k: torch.from_numpy(fill(k, tuple(s))) for k, s in case["state_dict"]}
    renamed = {}
    for key, value in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    return renamed


def _grid(n):
    return (round(n**0.5),) * 2


@pytest.mark.parity
@pytest.mark.parametrize("name", ["g8k4", "g6k6_one_token", "g24k4"])
def test_quecc_matches_the_official_module(golden, name):
    ref = golden("quecc")
    case = ref.meta["quecc"][name]
    multi, text, x = (_noise(case[f"{k}_seed"], case[f"{k}_shape"]) for k in ("multi", "text", "x"))
    net = QueCCCompressor(
        dim=x.shape[-1],
        levels_dim=multi.shape[-1],
        text_dim=text.shape[-1],
        window=case["kernel"],
        num_heads=case["heads"],
    )
    net.load_state_dict(_official(case, QUECC))
    out = net(x, multi, _grid(x.shape[1]), text[:, 0])
    torch.testing.assert_close(out, ref[f"quecc/{name}"], atol=2e-5, rtol=2e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["g8s2", "g12s4"])
def test_tokenpacker_matches_the_official_module(golden, name):
    ref = golden("quecc")
    case = ref.meta["tokenpacker"][name]
    x, multi = (_noise(case[f"{k}_seed"], case[f"{k}_shape"]) for k in ("x", "multi"))
    net = TokenPackerCompressor(dim=x.shape[-1], levels_dim=multi.shape[-1], window=case["scale_factor"])
    head = projector(x.shape[-1], case["hidden"])
    state = _official(case, TOKENPACKER)
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith("projector.")})
    head.load_state_dict({k.removeprefix("projector."): v for k, v in state.items() if k.startswith("projector.")})
    out = head(net(x, multi, _grid(x.shape[1])))
    torch.testing.assert_close(out, ref[f"tokenpacker/{name}"], atol=2e-5, rtol=2e-5)


def test_windows_are_blocks_of_the_grid():
    places = torch.arange(4 * 6).view(1, 24, 1)
    windows = to_windows(places, (4, 6), 2)[..., 0]
    assert windows[0, 0].tolist() == [0, 1, 6, 7]
    assert windows[0, 4].tolist() == [14, 15, 20, 21]


def _quecc(**changed):
    return QueCCCompressor(**{"dim": 16, "levels_dim": 32, "text_dim": 8, "window": 2, "num_heads": 4, **changed})


def test_a_window_sees_only_its_own_tokens():
    net, x, levels, text = _quecc(), torch.randn(1, 24, 16), torch.randn(1, 24, 32), torch.randn(1, 8)
    before = net(x, levels, (4, 6), text)
    x[:, 0] += 1
    levels[:, 1] += 1
    after = net(x, levels, (4, 6), text)
    changed = (before - after).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [True] + [False] * 5


def test_order_inside_a_window_does_not_matter_to_keys_and_values():
    net, x, levels, text = _quecc(), torch.randn(1, 16, 16), torch.randn(1, 16, 32), torch.randn(1, 8)
    swapped = levels.clone()
    swapped[:, [0, 5]] = levels[:, [5, 0]]  # the diagonal of the first window
    torch.testing.assert_close(net(x, swapped, (4, 4), text), net(x, levels, (4, 4), text))


def test_windows_of_one_token_attend_to_that_token():
    net = _quecc(window=1)
    x, levels, text = torch.randn(2, 6, 16), torch.randn(2, 6, 32), torch.randn(2, 8)
    value = torch.nn.functional.linear(net.value(levels), *(p.chunk(3)[2] for p in net.attn.in_proj.parameters()))
    torch.testing.assert_close(net(x, levels, (2, 3), text), net.attn.out_proj(value))


def test_the_question_is_learnt_from_and_a_batch_is_its_samples():
    net = _quecc()
    x, levels, text = torch.randn(3, 16, 16), torch.randn(3, 16, 32), torch.randn(3, 8)
    whole = net(x, levels, (4, 4), text)
    single = torch.cat([net(x[i : i + 1], levels[i : i + 1], (4, 4), text[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, single)
    whole.square().sum().backward()
    assert net.text[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [_quecc, lambda: TokenPackerCompressor(dim=16, levels_dim=32, window=2, num_heads=4)])
def test_bf16_stays_near_float32(make):
    net = make().eval()
    x, levels, text = torch.randn(1, 16, 16), torch.randn(1, 16, 32), torch.randn(1, 8)
    given = (text,) if net.text_dim else ()
    exact = net(x, levels, (4, 4), *given)
    rough = net.bfloat16()(x.bfloat16(), levels.bfloat16(), (4, 4), *(t.bfloat16() for t in given))
    torch.testing.assert_close(rough.float(), exact, atol=2e-2, rtol=2e-2)


def test_what_does_not_fit_is_refused():
    x, levels, text = torch.randn(1, 16, 16), torch.randn(1, 16, 32), torch.randn(1, 8)
    with pytest.raises(ValueError, match=r"grid of \(4, 4\) cannot be cut into windows of 3 x 3"):
        _quecc(window=3)(x, levels, (4, 4), text)
    with pytest.raises(ValueError, match="reads a question's vector"):
        _quecc()(x, levels, (4, 4))
    with pytest.raises(ValueError, match="reads no text"):
        _quecc(text_dim=None)(x, levels, (4, 4), text)
    with pytest.raises(ValueError, match="width of 16 cannot be split into 3 heads"):
        _quecc(num_heads=3)
