"""`TrainedCompressor`: what lies between a tower and a language model, with weights of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from vistok import hub
from vistok.compress.resample import Compressor, out_grid, projector

Question = Literal["hidden", "embeddings"]


class TrainedCompressor(hub.Saveable, nn.Module):
    """A network of windows and the projector behind it, saved and loaded apart from any host.

    Attributes:
        network: From the tower's tokens to fewer of them.
        projector: From the tower's width to the language model's.
        dim: Width of the tower's tokens.
        out_dim: Width of the language model.
        levels: Hidden states of the tower that keys and values are made of, as transformers numbers them: 0 is the
            embeddings, i the output of block i - 1.
        levels_dim: Their widths together.
        grid: Rows and columns of the tower's tokens it was made for.
        renumber: Positions are counted anew behind its tokens (as published); else each token keeps the position of
            the patch in the middle of its window.
        question: Where the question's vector comes from, see `QueCC`; of no meaning without `text_dim`.
        skip: Tokens between picture and question, and behind the question, that belong to the chat template.
    """

    registry_kind: ClassVar[str] = "compressor"
    network: Compressor
    projector: nn.Sequential
    question: Question = "hidden"
    skip: tuple[int, int] = (0, 0)

    def __init__(
        self,
        network: Compressor,
        *,
        dim: int,
        out_dim: int,
        levels: Sequence[int],
        levels_dim: int,
        grid: Sequence[int],
        renumber: bool,
    ) -> None:
        super().__init__()
        if not levels or any(level < 0 for level in levels):
            raise ValueError(f"levels={list(levels)}: at least one hidden state of the tower, numbered from 0 on.")
        self.network, self.projector = network, projector(dim, out_dim)
        self.dim, self.out_dim, self.levels, self.levels_dim = dim, out_dim, tuple(levels), levels_dim
        self.grid, self.renumber = (int(grid[0]), int(grid[1])), renumber
        out_grid(self.grid, network.window)

    @property
    def window(self) -> int:
        """Side of a window in tokens."""
        return self.network.window

    @property
    def text_dim(self) -> int | None:
        """Channels of the question's vector, None if none is read."""
        return self.network.text_dim

    @property
    def num_tokens(self) -> int:
        """Tokens it gives for a picture of `grid`."""
        h, w = out_grid(self.grid, self.window)
        return h * w

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight that every loss reaches."""
        weight = self.projector[-1].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def model_id(self) -> str:
        """8 hex digits of its weights."""
        return hub.model_id(self.state_dict())

    def forward(
        self, features: Tensor, levels: Tensor, grid: tuple[int, ...] | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Compress pictures, in the precision of the weights.

        Args:
            features: What the host's own projector would get, (B, h * w, C).
            levels: Hidden states side by side, (B, h * w, K).
            grid: (h, w), multiples of the window; `self.grid` if None.
            text: Vectors of the questions, (B, t), if it reads one.

        Returns:
            (B, M, D), for the language model.
        """
        dtype = self.last_layer.dtype
        text = text if text is None else text.to(dtype)
        tokens = self.network(features.to(dtype), levels.to(dtype), grid or self.grid, text)
        found: Tensor = self.projector(tokens)
        return found

    def start_from(self, other: TrainedCompressor, source: str) -> None:
        """Take the weights of a compressor that a recipe starts from (`train.init_from`), strictly.

        Raises:
            LoadError: Weights that do not fit.
        """
        hub.load_strictly(self, other.state_dict(), source)


def own_keys(tensors: Mapping[str, Tensor], rules: hub.Rules) -> dict[str, Tensor]:
    """Tensors of an official projector under our keys; of a whole checkpoint its `mm_projector.*` alone."""
    mine = {k: v for k, v in tensors.items() if "mm_projector." in k} or tensors
    named = hub.rename(mine, rules)
    return {k if k.startswith("projector.") else f"network.{k}": v for k, v in named.items()}
