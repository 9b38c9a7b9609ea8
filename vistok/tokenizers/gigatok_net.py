"""GigaTok's four transformers between the convolutions and the code book (arXiv 2504.08736)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.layers.conv import to_map, to_sequence
from vistok.layers.local_start import attend_by_place, places, read_content, write_content
from vistok.layers.position import learned_table
from vistok.layers.query import QueryTransformer
from vistok.layers.transformer import Size, Transformer

Layer = Literal["query", "plain"]


class Trunk(nn.Module):
    """What all four transformers share: an embedding with a norm in front, positions of the map, a norm at the end.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of what comes in.
    """

    def __init__(self, grid: tuple[int, int], size: Size, channels: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm_pre = nn.LayerNorm(channels)
        self.embed = nn.Linear(channels, size.width)
        self.position = learned_table(grid[0] * grid[1], size.width)
        self.norm_post = nn.LayerNorm(size.width)

    def embedded(self, x: Tensor) -> Tensor:
        """(B, N, channels) -> (B, N, D)."""
        return self.embed(self.norm_pre(x.to(self.embed.weight.dtype)))


class MapTokens(Trunk):
    """What both 1D transformers share: positions of K tokens, queries that attend to a memory.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of map and tokens.
        num_tokens: K.
    """

    head: nn.Linear | nn.Conv2d

    def __init__(self, grid: tuple[int, int], size: Size, channels: int, num_tokens: int) -> None:
        super().__init__(grid, size, channels)
        self.latent_position = learned_table(num_tokens, size.width)
        self.transformer = QueryTransformer(size.width, size.depth, size.heads)

    @torch.no_grad()
    def start_local(self) -> None:
        """Let tokens and the positions of the map begin by attending to each other's places."""
        patches, tokens = places(len(self.position), *self.latent_position.shape)
        self.position.copy_(patches)
        self.latent_position.copy_(tokens)
        write_content(self.embed)
        attend_by_place(self.transformer)
        read_content(self.head)


class MapToTokens(MapTokens):
    """1D encoder: queries averaged from the map at many scales attend to the map.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of the map, and of the tokens.
        num_tokens: K, a power of two.
    """

    def __init__(self, grid: tuple[int, int], size: Size, channels: int, num_tokens: int) -> None:
        super().__init__(grid, size, channels, num_tokens)
        self.blocks_of = query_grids(num_tokens, grid)
        self.query_proj = nn.Linear(size.width, size.width)
        self.head = nn.Linear(size.width, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels, h, w) -> the last layer's norm, (B, K, D), before `head`."""
        memory = self.embedded(to_sequence(features))
        image = to_map(memory, self.grid)
        means = [to_sequence(F.adaptive_avg_pool2d(image, blocks)) for blocks in self.blocks_of]
        queries = self.query_proj(torch.cat(means, dim=1))
        x, _ = self.transformer(queries, memory, self.position, self.latent_position)
        return self.norm_post(x)

    def start_local(self) -> None:
        """As the other direction; queries are contents too."""
        super().start_local()
        write_content(self.query_proj)


class TokensToMap(MapTokens):
    """1D decoder: as many copies of the first token as the map has positions attend to the tokens.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of the tokens, and of the map.
        num_tokens: K.
    """

    def __init__(self, grid: tuple[int, int], size: Size, channels: int, num_tokens: int) -> None:
        super().__init__(grid, size, channels, num_tokens)
        self.head = nn.Conv2d(size.width, channels, 3, padding=1)

    def forward(self, tokens: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, K, channels) -> map (B, channels, h, w), and the stream (B, h * w, D) after layer `tap`."""
        memory = self.embedded(tokens)
        queries = memory[:, :1].expand(-1, len(self.position), -1)
        x, tapped = self.transformer(queries, memory, self.latent_position, self.position, tap)
        return self.head(to_map(self.norm_post(x), self.grid)), tapped


class MapToMap(Trunk):
    """Encoder or decoder of the 2D variant: a transformer over the positions of the map.

    Args:
        grid: Map positions (h, w).
        size: Shape of the transformer.
        channels: Channels of the map, in and out.
        layer: `plain`: pre-norm blocks, positions added once to the stream; `query`: the 1D variant's layers, with
            the stream itself as memory.
        kernel: Kernel of the last layer, 1 or 3.
    """

    def __init__(self, grid: tuple[int, int], size: Size, channels: int, layer: Layer, kernel: int) -> None:
        super().__init__(grid, size, channels)
        make = {"plain": Transformer, "query": QueryTransformer}[layer]
        self.transformer = make(size.width, size.depth, size.heads)
        wide = nn.Conv2d(size.width, channels, kernel, padding=kernel // 2)
        self.head: nn.Module = wide if kernel > 1 else nn.Linear(size.width, channels)

    def forward(self, tokens: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, h * w, channels) -> the last layer's norm (B, h * w, D), and the stream after layer `tap`."""
        x = self.embedded(tokens)
        if isinstance(self.transformer, QueryTransformer):
            x, tapped = self.transformer(x, None, self.position, self.position, tap)
        else:
            x, tapped = _tapped(self.transformer, x + self.position, tap)
        return self.norm_post(x), tapped


def query_grids(num_tokens: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(h, w) blocks that the queries are means of, coarse to fine: 1x1, 1x1, 1x2, 2x2, 2x4, ...; K in all.

    Raises:
        ValueError: K is no power of two, or its finest blocks do not divide the map.
    """
    steps = num_tokens.bit_length() - 1
    if num_tokens < 1 or num_tokens != 2**steps:
        raise ValueError(f"num_tokens is a power of two for GigaTok's queries, got {num_tokens}.")
    levels = [max(i - 1, 0) for i in range(steps + 1)]
    found = [(2 ** (level // 2), 2 ** ((level + 1) // 2)) for level in levels]
    if grid[0] % found[-1][0] or grid[1] % found[-1][1]:
        fine = f"{found[-1][0]}x{found[-1][1]}"
        raise ValueError(f"{num_tokens} tokens need a map of multiples of {fine}, and this one is {grid[0]}x{grid[1]}.")
    return found


def _tapped(transformer: Transformer, x: Tensor, tap: int | None) -> tuple[Tensor, Tensor | None]:
    """A plain transformer's output, and its stream after block `tap`."""
    if tap is None:
        return transformer(x), None
    kept: list[Tensor] = []
    handle = transformer.blocks[tap - 1].register_forward_hook(lambda module, args, out: kept.append(out))
    try:
        return transformer(x), kept[0]
    finally:
        handle.remove()
