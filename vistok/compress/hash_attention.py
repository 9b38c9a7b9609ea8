"""VQ-attention: mixes where the clusters of a clip are into what they look like (VQToken, arXiv 2503.16980)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VQAttention(nn.Module):
    """As the released code has it; keys are those of the published checkpoint (`model.cross_attention.*`).

    Every *frame* is a query: its row of the hash map as raw floats, projected. The memory are the cluster means. The
    shorter of the two is tiled to the longer, so max(T, K) rows come out. One post-norm decoder layer.

    Args:
        cells: Tokens of a frame (729 in the checkpoint).
        width: Width of the features (896 in the checkpoint).
        heads: Attention heads.
        inner: Width inside the feed-forward part.
        layers: Decoder layers.
    """

    def __init__(self, cells: int, width: int, *, heads: int = 8, inner: int = 2048, layers: int = 1) -> None:
        super().__init__()
        self.width = width
        layer = nn.TransformerDecoderLayer(width, heads, inner, dropout=0.1, activation="relu", batch_first=True)
        self.transformer_decoder = nn.TransformerDecoder(layer, layers)
        self.to_q_proj = nn.Linear(cells, width)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, hash_map: Tensor, means: Tensor) -> Tensor:
        """Mix.

        Args:
            hash_map: Cluster of every token, (B, T, cells).
            means: Cluster means, (B, K, D).

        Returns:
            (B, max(T, K), D).
        """
        query = self.to_q_proj(hash_map.to(means.dtype))
        rows = max(query.shape[1], means.shape[1])
        mixed: Tensor = self.transformer_decoder(_tiled(query, rows), _tiled(means, rows))
        return mixed


def _tiled(x: Tensor, rows: int) -> Tensor:
    """x repeated along its rows, cut to `rows`."""
    return x.repeat(1, -(-rows // x.shape[1]), 1)[:, :rows]


class CodebookAttention(nn.Module):
    """As the paper prints it, for any T, grid and K: queries and keys are the cluster means, values where they are.

    The paper's MLP(Flatten(M)) fixes T, grid and K and depends on how clusters are numbered. Our reading: each cluster
    has an occupancy volume (1 where the hash map names it), pooled to a fixed grid; the MLP maps that to a value. So
    the result does not depend on the numbering.

    Args:
        width: Width of the features.
        heads: Attention heads.
        grid: What occupancy is pooled to: frames, rows, columns.
        residual: Add the means and normalise. Not in the printed formula, but without it no appearance is left at all,
            since values come from the map alone.
    """

    grid: Tensor

    def __init__(
        self, width: int, *, heads: int = 8, grid: tuple[int, int, int] = (8, 6, 6), residual: bool = True
    ) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("grid", torch.tensor(grid))
        cells = grid[0] * grid[1] * grid[2]
        self.value = nn.Sequential(nn.Linear(cells, width), nn.GELU(), nn.Linear(width, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width) if residual else None

    def forward(self, hash_map: Tensor, means: Tensor) -> Tensor:
        """Mix.

        Args:
            hash_map: Cluster of every token, (B, T, h, w).
            means: Cluster means, (B, K, D).

        Returns:
            (B, K, D).
        """
        occupied = F.one_hot(hash_map, means.shape[1]).movedim(-1, 1).to(means.dtype)  # (B, K, T, h, w)
        frames, rows, cols = self.grid.tolist()
        value = self.value(F.adaptive_avg_pool3d(occupied, (frames, rows, cols)).flatten(2))
        mixed: Tensor = self.attention(means, means, value, need_weights=False)[0]
        return mixed if self.norm is None else self.norm(means + mixed)


def load_vq_attention(state: dict[str, Tensor], heads: int = 8) -> VQAttention:
    """The released module from its weights; the sizes are read off the shapes, the keys have to fit exactly.

    Args:
        state: Tensors, with or without the prefix `model.cross_attention.`; keys of the rest of a model are ignored
            only if that prefix is there.
        heads: Attention heads, which no shape tells.

    Raises:
        KeyError: There is no such module in it.
    """
    prefix = "model.cross_attention."
    if any(k.startswith(prefix) for k in state):
        state = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    if "to_q_proj.weight" not in state or "transformer_decoder.layers.0.linear1.weight" not in state:
        raise KeyError(
            f"No VQ-attention in these weights: to_q_proj.weight is missing (keys: {sorted(state)[:4]} ...)."
        )
    width, cells = state["to_q_proj.weight"].shape
    inner = state["transformer_decoder.layers.0.linear1.weight"].shape[0]
    layers = len({k.split(".")[2] for k in state if k.startswith("transformer_decoder.layers.")})
    with torch.device("meta"):
        module = VQAttention(cells, width, heads=heads, inner=inner, layers=layers)
    module.load_state_dict(state, assign=True)
    return module.eval()


def load_codebook_attention(state: dict[str, Tensor], heads: int = 8) -> CodebookAttention:
    """A `CodebookAttention` from its state dict; sizes and grid are read off it.

    Args:
        state: Tensors.
        heads: Attention heads, which no shape tells.

    Raises:
        KeyError: It is not one.
    """
    if "grid" not in state or "value.0.weight" not in state:
        raise KeyError(f"No CodebookAttention in these weights: grid is missing (there is {sorted(state)[:4]}).")
    frames, rows, cols = state["grid"].tolist()
    width = state["value.0.weight"].shape[0]
    module = CodebookAttention(width, heads=heads, grid=(frames, rows, cols), residual="norm.weight" in state)
    module.load_state_dict(state)
    return module.eval()
