"""A start for short runs: 1D tokens read and write places of a picture from the first step on (ours).

Which token stands for which part of a picture has to be found in training, and short runs on few pictures do not find
it: they end at colours and layouts. Here the width of a transformer begins as two lanes. Positions stand in the first
half of the channels and contents in the second; queries and keys, equal at first, read positions; values read and
projections write contents. Every token stands at the places of a few neighbouring patches, so that it first attends to
these and they to it. Training may change every weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Start = Literal["published", "local"]
"""How a tokenizer is initialised: as its authors do, or `local`, see above (FlexTok's has a way of its own)."""


def places(patches: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Positions of patches and of tokens, the same at every call.

    Patches get random vectors. A token's is the sum of those of its share of the patches, which follow each other in
    row-major order, at the same mean square; tokens come in random order.

    Returns:
        (P, D) and (K, D), 0 beyond the first half of the channels.
    """
    draw = torch.Generator().manual_seed(0)
    lane, most = width // 2, max(patches, tokens)
    where = torch.randn(patches, lane, generator=draw, device="cpu")
    order = torch.randperm(tokens, generator=draw, device="cpu")
    pairs = torch.arange(most, device="cpu")
    token, patch = order[pairs * tokens // most], pairs * patches // most
    own = torch.zeros(tokens, lane, device="cpu").index_add_(0, token, where[patch])
    own = own / own.square().mean(1, keepdim=True).sqrt()
    rest = width - lane
    return nn.functional.pad(where, (0, rest)), nn.functional.pad(own, (0, rest))


@torch.no_grad()
def attend_by_place(transformer: nn.Module) -> None:
    """Attention that finds equal positions and moves contents, in every layer with a fused `qkv` and a `proj`."""
    for layer in transformer.modules():
        if isinstance(qkv := getattr(layer, "qkv", None), nn.Linear) and isinstance(layer.proj, nn.Linear):
            width = qkv.in_features
            lane = width // 2
            query, key, value = qkv.weight.chunk(3)
            nn.init.normal_(query, std=lane**-0.5)
            query[:, lane:] = 0
            key.copy_(query)
            nn.init.normal_(value, std=(width - lane) ** -0.5)
            value[:, :lane] = 0
            _without_bias(qkv)
            write_content(layer.proj)


@torch.no_grad()
def write_content(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    """Make a layer's outputs contents, `gain` times as strong as its inputs."""
    nn.init.normal_(layer.weight, std=gain * layer.weight[0].numel() ** -0.5)
    layer.weight[: len(layer.weight) // 2] = 0
    _without_bias(layer)


@torch.no_grad()
def read_content(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    """Make a layer (Xavier-uniform, times `gain`) read contents only."""
    nn.init.xavier_uniform_(layer.weight, gain)
    layer.weight[:, : layer.weight.shape[1] // 2] = 0
    _without_bias(layer)


@torch.no_grad()
def embed_pixels(layer: nn.Conv2d) -> None:
    """Make a patch embedding, which has a bias, give contents that are zero for a grey picture in [0, 1]."""
    write_content(layer, 2.0)
    assert layer.bias is not None
    layer.bias.copy_(-0.5 * layer.weight.flatten(1).sum(1))


@torch.no_grad()
def draw_pixels(layer: nn.Linear, smooth: nn.Conv2d | None = None) -> None:
    """Make an output layer draw contents faintly on grey, and a convolution after it do nothing."""
    read_content(layer, 0.3)
    if smooth is not None:
        nn.init.dirac_(smooth.weight)
    nn.init.constant_((smooth or layer).bias, 0.5)


def _without_bias(layer: nn.Linear | nn.Conv2d) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
