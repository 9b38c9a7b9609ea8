"""open_clip: its own VisionTransformer; towers from timm are found as timm's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from vistok.plugins.families.clip_vit import PoolingMask
from vistok.plugins.families.encoder import Encoder, Step
from vistok.plugins.handle import Handle
from vistok.registry import register

if TYPE_CHECKING:
    from vistok.plugins.tower import TowerRuntime


class MeanPool:
    """Stands in for `_global_pool`: means are weighted by sizes."""

    def __init__(self, runtime: TowerRuntime, tower: Any, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.__wrapped__ = original
        self.runtime, self.tower = runtime, tower

    def __call__(self, x: Tensor) -> Any:
        """Pooled and other tokens, (B, D) and (B, T, D)."""
        sizes = None if self.runtime.restore else self.runtime.sizes
        if sizes is None or self.tower.pool_type != "avg" or sizes.shape[1] != x.shape[1]:
            return self.__wrapped__(x)
        weight = (sizes[:, 1:] / sizes[:, 1:].sum(1, keepdim=True)).unsqueeze(-1).to(x.dtype)
        return (x[:, 1:] * weight).sum(1), x[:, 1:]


@register("family", "open_clip_vit")
class OpenClipViT(Encoder):
    """Blocks around `nn.MultiheadAttention`, which hides its keys, or around open_clip's own attention."""

    hosts = ("VisionTransformer",)
    wrappers = ("CLIP", "CustomTextCLIP", "CoCa")

    @classmethod
    def fits(cls, module: Any) -> bool:
        """open_clip's class, not its namesake in timm."""
        names = {f"{base.__module__.split('.')[0]}.{base.__name__}" for base in type(module).__mro__}
        return bool(names & {f"open_clip.{host}" for host in cls.hosts})

    def blocks(self, tower: Any) -> Sequence[Any]:
        """The blocks."""
        return list(tower.transformer.resblocks)

    def scale(self, block: Any) -> float:
        """Factor of the logits."""
        return float(block.attn.head_dim**-0.5)

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """The attention branch; queries, keys and values once, fused attention on them."""
        step.refuse_mask(step.given.get("attn_mask", step.args[-1] if step.args else None))
        attn, x = block.attn, block.ln_1(x)
        if hasattr(attn, "ln_q"):
            self._hear(attn, x, step)
            found: Tensor = block.ls_1(block.ln_attn(attn(x, attn_mask=step.bias)))
            return found
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, T, d)
        step.queries, step.keys, step.content = q, k, k
        drop = attn.dropout if attn.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=step.bias, dropout_p=drop)
        out: Tensor = block.ls_1(attn.out_proj(mixed.transpose(1, 2).flatten(2)))
        return out

    def _hear(self, attn: Any, x: Tensor, step: Step) -> None:
        """Queries and keys of open_clip's own attention, computed once more where they are wanted."""
        if not step.heard:
            return
        width = x.shape[-1]
        bias = None if attn.in_proj_bias is None else attn.in_proj_bias[: 2 * width]
        both = F.linear(x, attn.in_proj_weight[: 2 * width], bias)
        q, k = both.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        step.queries, step.keys = attn.ln_q(q), attn.ln_k(k)
        step.content = step.keys

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """The MLP branch."""
        found: Tensor = block.ls_2(block.mlp(block.ln_2(x)))
        return found

    def grid(self, tower: Any, patches: int) -> tuple[int, ...] | None:
        """The tower's grid if it has so many cells."""
        h, w = tower.grid_size
        return (h, w) if h * w == patches else super().grid(tower, patches)

    def weigh_pooling(self, tower: Any, runtime: TowerRuntime, handle: Handle) -> None:
        """Means and attention pools."""
        handle.attribute(tower, "_global_pool", MeanPool(runtime, tower, tower._global_pool))
        for pool in (tower.attn_pool, getattr(tower, "attn_pool_contrastive", None)):
            if pool is not None:
                handle.before(pool.attn, PoolingMask(runtime))

    def check(self, tower: Any) -> None:
        """Refuse scaled cosine attention, whose logits are no products of its queries and keys.

        Raises:
            TypeError: It has it, or its batches come second.
        """
        if any(getattr(block.attn, "scaled_cosine", False) for block in self.blocks(tower)):
            raise TypeError("Scaled cosine attention is not supported: open_clip itself cannot run it on batches.")
        if not tower.transformer.batch_first:
            raise TypeError("This tower's blocks take (tokens, batch, width). Build it with batch_first=True.")
