"""timm: VisionTransformer (DeiT, DINOv2, CLIP, SigLIP, registers, distilled) and EVA with rotary positions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vistok.plugins.families.encoder import Encoder, Step, log_sizes
from vistok.plugins.handle import Handle
from vistok.registry import register

if TYPE_CHECKING:
    from vistok.plugins.tower import TowerRuntime


class TimmPool:
    """Stands in for `pool` of a tower: means are weighted by sizes."""

    def __init__(self, runtime: TowerRuntime, tower: Any, original: Callable[..., Tensor]) -> None:
        functools.update_wrapper(self, original)
        self.__wrapped__ = original
        self.runtime, self.tower = runtime, tower

    def __call__(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens, (B, T, D) -> (B, D)."""
        kind = self.tower.global_pool if pool_type is None else pool_type
        include = getattr(self.tower, "pool_include_prefix", False)
        sizes = None if self.runtime.restore else self.runtime.sizes
        if sizes is None or self.tower.attn_pool is not None or "avg" not in kind:
            return self.__wrapped__(x, pool_type)
        first = 0 if include else self.tower.num_prefix_tokens
        weight = (sizes / sizes[:, first:].sum(1, keepdim=True))[:, first:, None].to(x.dtype)
        mean = (x[:, first:] * weight).sum(1)
        return mean if kind == "avg" else 0.5 * (x[:, first:].amax(1) + mean)


class TimmAttentionPool:
    """Pre-hook of an attention pool: tokens count as often as they stand for patches."""

    def __init__(self, runtime: TowerRuntime, tower: Any) -> None:
        self.runtime, self.tower = runtime, tower

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the logarithm of the sizes."""
        tokens = args[0].shape[1]
        sizes = self.runtime.sizes
        bias = None if sizes is None else log_sizes(self.runtime, args[0].dtype, sizes.shape[1] - tokens)
        return None if bias is None else (args, kwargs | {"attn_mask": bias[:, None, None]})


@register("family", "timm_vit")
class TimmViT(Encoder):
    """Blocks with norm before or after, LayerScale, QK norm, scaled or gated attention; parallel blocks.

    In parallel blocks nothing lies between attention and MLP, so tokens are merged after the block.
    """

    hosts: ClassVar[tuple[str, ...]] = ("VisionTransformer", "VisionTransformerDistilled")
    wrappers = ("TimmModel", "CLIP", "CustomTextCLIP", "CoCa")
    qk = ("q_norm", "k_norm")
    known: ClassVar[tuple[str, ...]] = ("Block", "ResPostBlock", "ParallelScalingBlock")

    @classmethod
    def fits(cls, module: Any) -> bool:
        """timm's class, not its namesake in open_clip."""
        names = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(module).__mro__}
        return bool(names & {f"timm.{host}" for host in cls.hosts})

    def blocks(self, tower: Any) -> Sequence[Any]:
        """The blocks."""
        return list(tower.blocks)

    def prefix(self, tower: Any) -> int:
        """Class token, distillation token, registers."""
        return int(tower.num_prefix_tokens)

    def class_token(self, tower: Any) -> bool:
        """Registers alone are no class token."""
        return tower.cls_token is not None

    def attention(self, block: Any) -> Any:
        """A parallel block is its own attention."""
        return getattr(block, "attn", block)

    def mlp(self, block: Any) -> Any:
        """None in a parallel block."""
        return getattr(block, "mlp", None)

    def split(self, block: Any, x: Tensor) -> Tensor:
        """Parallel blocks normalise before they transpose."""
        return x if hasattr(block, "attn") else x.transpose(1, 2)

    def grid(self, tower: Any, patches: int) -> tuple[int, ...] | None:
        """The patch embedding's grid if it has so many cells."""
        grid = getattr(getattr(tower, "patch_embed", None), "grid_size", None)
        return tuple(grid) if grid and grid[0] * grid[1] == patches else super().grid(tower, patches)

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """The attention branch."""
        step.refuse_mask(step.given.get("attn_mask", step.args[0] if step.args else None))
        if not hasattr(block, "attn"):
            whole: Tensor = type(block).forward(block, x, attn_mask=step.bias) - x
            return whole
        if type(block).__name__ == "ResPostBlock":
            found: Tensor = block.drop_path1(block.norm1(block.attn(x, attn_mask=step.bias)))
        else:
            found = block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=step.bias)))
        return found

    def feed(self, block: Any, x: Tensor) -> Tensor | None:
        """The MLP branch."""
        if not hasattr(block, "attn"):
            return None
        if type(block).__name__ == "ResPostBlock":
            found: Tensor = block.drop_path2(block.norm2(block.mlp(x)))
        else:
            found = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return found

    def weigh_pooling(self, tower: Any, runtime: TowerRuntime, handle: Handle) -> None:
        """Means and attention pools."""
        handle.attribute(tower, "pool", TimmPool(runtime, tower, tower.pool))
        if tower.attn_pool is not None:
            handle.before(tower.attn_pool, TimmAttentionPool(runtime, tower))

    def check(self, tower: Any) -> None:
        """Refuse blocks whose arithmetic is not known, and pools without a place for sizes."""
        unknown = {type(block).__name__ for block in tower.blocks} - set(self.known)
        if unknown:
            raise TypeError(f"Blocks of type {', '.join(sorted(unknown))} are not supported; known: {self.known}.")
        pool = type(tower.attn_pool).__name__
        if tower.attn_pool is not None and pool != "AttentionPoolLatent":
            raise TypeError(f"The pooling {pool} has no place for sizes of tokens. Choose another global_pool.")


@register("family", "timm_eva")
class TimmEva(TimmViT):
    """EVA and what shares its class: rotary positions go with the tokens, a merged one takes its destination's."""

    hosts = ("Eva",)
    known = ("EvaBlock", "EvaBlockPostNorm")

    def rotate(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """Rotate the patches; prefix tokens have no position."""
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        rope = self._rope(step)
        if rope is None:
            return x
        turned = apply_rot_embed_cat(x[:, :, step.prefix :], rope, half=getattr(block.attn, "rotate_half", False))
        return torch.cat([x[:, :, : step.prefix], turned.type_as(x)], dim=2)

    def _rope(self, step: Step) -> Tensor | None:
        rope = step.given.get("rope", step.args[0] if step.args else None)
        return None if rope is None else step.patch_rows(rope)

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """The attention branch."""
        step.refuse_mask(step.given.get("attn_mask", step.args[1] if len(step.args) > 1 else None))
        rope = self._rope(step)
        if hasattr(block, "gamma_1"):
            found: Tensor = block.attn(block.norm1(x), rope=rope, attn_mask=step.bias)
            found = found if block.gamma_1 is None else block.gamma_1 * found
        else:
            found = block.norm1(block.attn(x, rope=rope, attn_mask=step.bias))
        branch: Tensor = block.drop_path1(found)
        return branch

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """The MLP branch."""
        if hasattr(block, "gamma_1"):
            found: Tensor = block.mlp(block.norm2(x))
            found = found if block.gamma_2 is None else block.gamma_2 * found
        else:
            found = block.norm2(block.mlp(x))
        branch: Tensor = block.drop_path2(found)
        return branch
