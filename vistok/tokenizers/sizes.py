"""Which size a picture has when its tokens lie on a grid, or when the model takes several sizes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from vistok.quantizers.base import Quantizer
from vistok.tokenizers.identity import Identified
from vistok.tokens import Tokens


class Sized(Identified):
    """A model that knows its token grid, and pads and crops pictures of other sizes.

    Attributes:
        options: Names of the optional arguments of `encode`/`decode` that this tokenizer understands.
        multiple: For models that take pictures of any size: sides are padded to multiples of this (the model does so in
            `encode_features` and `grid_for`), and what is decoded is cropped back. None for models of one size.
        quantizer: The quantizer.
    """

    options: ClassVar[frozenset[str]] = frozenset()
    multiple: int | None = None
    quantizer: Quantizer

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """(h, w) of the tokens of a picture of `size` (H, W); None for 1D tokens."""
        return None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) of the tokens at the preprocessed size, None for 1D tokens."""
        return self.grid_for(self.preprocess.size)

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """As `grid_for`; None also where ids do not lie on that grid (multi-scale quantizers)."""
        grid = self.grid_for(size)
        if grid is None or self.quantizer.num_ids(math.prod(grid), grid) != math.prod(grid):
            return None
        return grid

    def target_size(self, tokens: Tokens | Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
        """(H, W) that tokens decode to: what was asked for, else what they say, else the preprocessed size.

        Raises:
            ValueError: Not a size, or one that the grid of the tokens does not make.
        """
        grid, known = (tokens.grid, tokens.size) if isinstance(tokens, Tokens) else (None, None)
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size is (H, W) in pixels, got {size}.")
        if size is not None and grid is not None and self.grid_for(size) != grid:
            raise ValueError(f"Tokens on a {grid[0]}x{grid[1]} grid do not make a picture of {size[0]}x{size[1]}.")
        known = size or known
        if grid is not None and (known is None or self.grid_for(known) != grid) and self.multiple:
            return (grid[0] * self.multiple, grid[1] * self.multiple)
        return known or self.preprocess.size

    def _check_count(self, count: int, size: tuple[int, int]) -> None:
        """Refuse plain ids that are not as many as a picture of `size` has."""
        grid = self.token_grid(size)
        if grid is not None and count != math.prod(grid):
            wanted = " Give size=(H, W) of the picture." if self.multiple else ""
            raise ValueError(
                f"{self.registry_name} decodes exactly {math.prod(grid)} tokens ({grid[0]}x{grid[1]}) to "
                f"{size[0]}x{size[1]} pixels and got {count} per picture.{wanted}"
            )

    def _place(self, size: tuple[int, int]) -> dict[str, Any]:
        """What `decode_codes` needs to know of the picture: its grid, or its size where 1D tokens leave it open."""
        grid = self.grid_for(size)
        if grid is not None:
            return {"grid": grid}
        return {"size": size} if "size" in self.options else {}

    def _cropped(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """The picture without the padding of its sides."""
        return images[..., : size[0], : size[1]] if self.multiple else images
