"""`Encoder`: what the runtime has to know about a kind of vision transformer. One small file each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vistok.compress.reduction import take
from vistok.plugins.handle import Handle
from vistok.registry import list_names, registry

if TYPE_CHECKING:
    from vistok.plugins.tower import TowerRuntime

FOUR = (
    "blocks(tower): its blocks in order",
    "attend(block, x, step): the attention branch of a block, scale and drop path included",
    "feed(block, x): the MLP branch",
    "prefix(tower): leading tokens that are no patches",
)


@dataclass(kw_only=True)
class Step:
    """One run of a block's attention.

    Attributes:
        args: Positional arguments of the block after the tokens.
        given: Keyword arguments of the block.
        prefix: Leading tokens that are no patches.
        bias: Additive to the logits, (B, 1, 1, T), None for nothing.
        index: Place of every token in the tower's own sequence, (B, T), None if nothing has changed.
        heard: Queries and keys are wanted.
        queries: As used, (B, heads, T, d).
        keys: As used.
        content: Keys before rotary positions.
    """

    args: tuple[Any, ...]
    given: dict[str, Any]
    prefix: int
    bias: Tensor | None
    index: Tensor | None
    heard: bool
    queries: Tensor | None = field(default=None)
    keys: Tensor | None = field(default=None)
    content: Tensor | None = field(default=None)

    def patch_rows(self, table: Tensor) -> Tensor:
        """Rows of a table of patch positions (..., patches, C) at the patches that are left.

        Returns:
            The table itself if nothing has changed; else (B, 1 or heads, T - prefix, C).
        """
        if self.index is None:
            return table
        index = self.index[:, self.prefix :] - self.prefix
        if table.ndim == 2:
            return table[index].unsqueeze(1)
        if table.ndim == 3:  # (heads, patches, C)
            return table[:, index].transpose(0, 1)
        index = index.view(len(index), 1, -1, 1)
        return table.gather(2, index.expand(-1, table.shape[1], -1, table.shape[3]))

    def token_rows(self, table: Tensor) -> Tensor:
        """Rows of a table over the tower's own sequence (B, tokens, ...) at the tokens that are left."""
        return table if self.index is None else take(table, self.index)

    def refuse_mask(self, mask: Any) -> None:
        """A caller's mask over the original tokens cannot follow tokens that are merged.

        Raises:
            ValueError: There is one.
        """
        if mask is not None:
            raise ValueError(
                "An attention mask over the tower's original tokens cannot follow tokens that are merged or dropped. "
                "Leave the mask away, or detach the method for this call."
            )


class Encoder:
    """One kind of vision transformer. Subclass, override what differs, decorate with `@register("family", name)`.

    Attributes:
        hosts: Class names of the towers it fits (subclasses fit too).
        wrappers: Class names of models around a tower that use nothing of it but the class token or a pooling that
            `weigh_pooling` sets right. Other models around a tower get every block at full length.
        flat: The tower runs all pictures as one sequence, (L, D); blocks give full length always.
        qk: Submodules of a block's attention whose outputs are the queries and the keys before rotary positions.
    """

    hosts: ClassVar[tuple[str, ...]] = ()
    wrappers: ClassVar[tuple[str, ...]] = ()
    flat: ClassVar[bool] = False
    qk: ClassVar[tuple[str, str] | None] = None

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module is a tower of this kind."""
        return any(base.__name__ in cls.hosts for base in type(module).__mro__)

    def blocks(self, tower: Any) -> Sequence[Any]:
        """The blocks in order."""
        raise NotImplementedError

    def prefix(self, tower: Any) -> int:
        """Leading tokens that are no patches."""
        return 1

    def class_token(self, tower: Any) -> bool:
        """Whether token 0 summarises the picture."""
        return self.prefix(tower) > 0

    def attention(self, block: Any) -> Any:
        """The attention module of a block."""
        return block.attn

    def mlp(self, block: Any) -> Any:
        """The MLP of a block."""
        return block.mlp

    def heads(self, block: Any) -> int:
        """Query heads."""
        return int(self.attention(block).num_heads)

    def scale(self, block: Any) -> float:
        """Factor of the logits."""
        return float(self.attention(block).scale)

    def split(self, block: Any, x: Tensor) -> Tensor:
        """What the `qk` submodules give as heads, (B, heads, T, d)."""
        return x if x.ndim == 4 else x.unflatten(-1, (self.heads(block), -1)).transpose(1, 2)

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """What attention adds to x, (B, T, D), with `step.bias` on the logits; leaves queries and keys in the step."""
        raise NotImplementedError

    def feed(self, block: Any, x: Tensor) -> Tensor | None:
        """What the MLP adds to x, (B, T, D); None where `attend` has added it already."""
        raise NotImplementedError

    def rotate(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """Rotary positions on queries or keys, (B, heads, T, d)."""
        return x

    def grid(self, tower: Any, patches: int) -> tuple[int, ...] | None:
        """Grid of a number of patches; square by default, None if it is none."""
        side = math.isqrt(patches)
        return (side, side) if side * side == patches else None

    def weigh_pooling(self, tower: Any, runtime: TowerRuntime, handle: Handle) -> None:
        """Make the tower's own pooling count sizes."""

    def check(self, tower: Any) -> None:
        """Refuse a tower of this kind that cannot be right.

        Raises:
            TypeError: With the reason.
        """


def log_sizes(runtime: TowerRuntime, dtype: torch.dtype, prefix: int) -> Tensor | None:
    """Logarithm of the sizes at the end of the tower, behind a prefix, (B, T); None if nothing has changed."""
    sizes = runtime.sizes
    if sizes is None or runtime.restore:
        return None
    return sizes[:, prefix:].log().to(dtype)


def encoder_of(module: nn.Module) -> Encoder | None:
    """The kind of a tower, None if it is no known one."""
    for name in list_names("family"):
        _, builder, _ = registry("family").resolve(name)
        if issubclass(builder, Encoder) and builder.fits(module):  # type: ignore[arg-type, attr-defined]
            found: Encoder = builder()
            return found
    return None


def find_tower(model: nn.Module) -> tuple[Encoder, nn.Module]:
    """The tower in a model: the model itself or the only one inside it.

    Raises:
        TypeError: There is none, or there are several.
    """
    found: list[tuple[str, Encoder, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer, _, _ in found)
        encoder = None if inside else encoder_of(module)
        if encoder is not None:
            found.append((name, encoder, module))
    if not found:
        supplied = "; ".join(f"({i}) {text}" for i, text in enumerate(FOUR, 1))
        raise TypeError(
            f"A {type(model).__name__} is no known host and holds no known vision transformer. Known: "
            f"{', '.join(list_names('family'))}. For a vision transformer subclass "
            f"vistok.plugins.families.encoder.Encoder: {supplied}."
        )
    if len(found) > 1:
        raise TypeError(
            f"A {type(model).__name__} holds several vision transformers: {', '.join(name for name, _, _ in found)}. "
            "Attach to one of them."
        )
    _, encoder, tower = found[0]
    encoder.check(tower)
    return encoder, tower
