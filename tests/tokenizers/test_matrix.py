"""Any quantizer fits any tokenizer by one line of configuration; found from the registry, so new ones join."""

from __future__ import annotations

import inspect
import math
import re
from itertools import cycle

import pytest
import torch

import vistok
from tests.quantizers.zoo import ZOO
from vistok.quantizers.base import Quantizer
from vistok.registry import registry
from vistok.tokenizers.base import Tokenizer


def tiny_presets() -> dict[str, str]:
    """Builder to its tiny preset, the one named after it where there are several."""
    tokenizers = registry("tokenizer")
    found: dict[str, str] = {}
    for name in tokenizers.names("*_tiny"):
        builder = tokenizers.resolve(name)[0]
        if builder not in found or name == f"{builder}_tiny":
            found[builder] = name
    return found


TINY = tiny_presets()
BUILDERS = sorted(TINY)
PAIRS = [(builder, kind) for builder in BUILDERS for kind in ZOO]
SAMPLED = list(zip(cycle(BUILDERS), ZOO)) if len(ZOO) >= len(BUILDERS) else list(zip(BUILDERS, cycle(ZOO)))
BATCH = 2


def spec_for(builder: str, kind: str) -> dict:
    """The zoo's configuration; a multi-scale one ends at the side of the tokenizer's grid."""
    spec = dict(ZOO[kind])
    if "scales" in spec:
        grid = vistok.create("tokenizer", TINY[builder]).grid
        side = grid[0] if grid else 4
        spec["scales"] = sorted({1, max(1, side // 2), side})
    return spec


def build(builder: str, kind: str) -> Tokenizer:
    """The pair, with codes that are told apart."""
    torch.manual_seed(0)
    return vistok.create("tokenizer", TINY[builder], quantizer=spec_for(builder, kind))


def pictures(tok: Tokenizer) -> torch.Tensor:
    return torch.rand(BATCH, 3, *tok.preprocess.size, generator=torch.Generator().manual_seed(1))


def continuous(builder: str) -> bool:
    """Whether a tokenizer is one of continuous latents without a choice of quantizer."""
    takes_one = "quantizer" in inspect.signature(registry("tokenizer").builders[builder]).parameters
    return not takes_one and not vistok.create("tokenizer", TINY[builder]).quantizer.vocab_sizes


def refusal(builder: str, kind: str) -> str:
    """What the constructor says of a pair that makes no sense; empty if it can be built.

    There are three reasons: several scales need a grid to be scales of, a fixed transform has digits of its own, and a
    tokenizer of continuous latents has nothing to quantise.
    """
    if continuous(builder):
        with pytest.raises(ValueError, match="quantizer: .* has no such key"):
            build(builder, kind)
        return "continuous latents"
    try:
        build(builder, kind)
    except ValueError as err:
        said = str(err)
        flat = "scales" in ZOO[kind] and vistok.create("tokenizer", TINY[builder]).grid is None
        scales = flat and re.search("needs a grid of features|scales end at the side of the grid", said)
        own = re.search(r"quantizer is (\w+), got", said)
        assert scales or (own and own[1] != ZOO[kind]["name"]), said
        return str(err)
    return ""


def check(builder: str, kind: str) -> None:
    if refusal(builder, kind):
        return
    tok = build(builder, kind).eval()
    tokens = tok.encode(pictures(tok))
    assert len(tokens) == BATCH and tokens.num_tokens == tok.num_tokens
    if tokens.ids is None:
        assert not tok.quantizer.vocab_sizes and tokens.codes.shape[-1] == tok.quantizer.dim
    else:
        top = torch.tensor([v - 1 for v in tok.quantizer.vocab_sizes])
        assert tokens.ids.min() >= 0 and bool((tok.quantizer.grouped(tokens.ids) <= top).all())
        codes = tok.tokens_to_codes(tokens.ids)
        assert codes.shape[-1] == tok.quantizer.dim
        if tokens.codes is not None:
            torch.testing.assert_close(codes, tokens.codes, rtol=0, atol=1e-4)
    check_pixels(tok, tokens)


def check_pixels(tok: Tokenizer, tokens) -> None:
    options = {"steps": 1} if "steps" in tok.options else {}
    try:
        found = tok.decode(tokens, **options)
    except ValueError as err:  # pixels come from a pipeline that the user brings along
        assert "pipeline" in str(err)
        return
    assert found.shape == (BATCH, 3, *tok.preprocess.size) and found.isfinite().all()
    if tokens.ids is not None:
        torch.testing.assert_close(tok.decode(tokens.ids, **options), found, rtol=0, atol=1e-4)


def test_every_tokenizer_has_a_tiny_preset_and_takes_a_quantizer():
    builders = registry("tokenizer").builders
    assert set(builders) == set(TINY)
    without = [n for n, b in builders.items() if "quantizer" not in inspect.signature(b).parameters]
    assert [n for n in without if not continuous(n)] == []


def test_several_scales_are_refused_where_there_is_no_grid():
    assert "needs a grid of features" in refusal("titok", "multiscale")
    assert refusal("maskgit_vqgan", "multiscale") == ""


def test_every_quantizer_is_in_the_matrix():
    quantizers = registry("quantizer")
    quantizers.fill()
    found = {name for name, builder in quantizers.builders.items() if issubclass(builder, Quantizer)}
    assert {spec["name"] for spec in ZOO.values()} == found


@pytest.mark.parametrize(("builder", "kind"), SAMPLED)
def test_sampled_pairs_build_and_come_back(builder, kind):
    check(builder, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("builder", "kind"), [pair for pair in PAIRS if pair not in SAMPLED])
def test_all_pairs_build_and_come_back(builder, kind):
    check(builder, kind)


@pytest.mark.parametrize(("builder", "kind"), list(zip(BUILDERS, cycle(["fsq", "bsq", "vq_ema", "simvq", "lfq"]))))
def test_one_pair_of_every_tokenizer_trains_two_steps(builder, kind):
    tok = vistok.create("tokenizer", TINY[builder]) if refusal(builder, kind) else build(builder, kind)
    optim = torch.optim.AdamW([p for p in tok.parameters() if p.requires_grad], 1e-3)
    images, before = pictures(tok), {k: v.clone() for k, v in tok.state_dict().items()}
    for _ in range(2):
        out = tok(images)
        made = [out.images] if out.images is not None else list(out.extras.values())
        loss = torch.stack([x.float().square().mean() for x in made if x.is_floating_point()]).sum()
        optim.zero_grad()
        (loss + out.quantized.loss).backward()
        optim.step()
    assert math.isfinite(loss.item())
    moved = [k for k, v in tok.state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) > len(before) // 3
