"""transformers: CLIP, SigLIP, and the towers of Idefics3 and SmolVLM; their layers have one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vistok.plugins.families.encoder import Encoder, Step, log_sizes
from vistok.plugins.handle import Handle
from vistok.registry import register

if TYPE_CHECKING:
    from vistok.plugins.tower import TowerRuntime


def refuse_flash(tower: Any) -> None:
    """Refuse attention that takes no additive mask.

    Raises:
        TypeError: The tower runs flash attention of transformers.
    """
    kind = str(getattr(tower.config, "_attn_implementation", ""))
    if "flash" in kind:
        raise TypeError(f"{kind} takes no sizes of tokens. Load the model with attn_implementation='sdpa'.")


class PoolingMask:
    """Pre-hook of the `nn.MultiheadAttention` of a pool: tokens count as often as they stand for patches."""

    def __init__(self, runtime: TowerRuntime) -> None:
        self.runtime = runtime

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the logarithm of the sizes to the logits."""
        keys: Tensor = args[1]
        sizes = self.runtime.sizes
        if sizes is None or sizes.shape[1] < keys.shape[1]:  # a second pool behind a first one
            return None
        bias = log_sizes(self.runtime, keys.dtype, sizes.shape[1] - keys.shape[1])
        return None if bias is None else (args, kwargs | {"key_padding_mask": bias})


@register("family", "clip_vit")
class ClipViT(Encoder):
    """Norm, attention, norm, MLP; one class token."""

    hosts: ClassVar[tuple[str, ...]] = ("CLIPVisionModel", "CLIPVisionTransformer")
    wrappers: ClassVar[tuple[str, ...]] = ("CLIPModel", "CLIPVisionModelWithProjection")
    qk = ("q_proj", "k_proj")

    def blocks(self, tower: Any) -> Sequence[Any]:
        """The layers."""
        return list(tower.encoder.layers)

    def attention(self, block: Any) -> Any:
        """`self_attn`."""
        return block.self_attn

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """The attention branch."""
        step.refuse_mask(step.given.get("attention_mask", step.args[0] if step.args else None))
        given = {k: v for k, v in step.given.items() if k != "attention_mask"}
        found: Tensor = block.self_attn(hidden_states=block.layer_norm1(x), attention_mask=step.bias, **given)[0]
        return found

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """The MLP branch."""
        found: Tensor = block.mlp(block.layer_norm2(x))
        return found

    def check(self, tower: Any) -> None:
        """Refuse flash attention."""
        refuse_flash(tower)


@register("family", "siglip_vit")
class SiglipViT(ClipViT):
    """No class token; an attention pool that counts sizes."""

    hosts = ("SiglipVisionModel", "SiglipVisionTransformer", "Idefics3VisionTransformer", "SmolVLMVisionTransformer")
    wrappers = ("SiglipModel",)

    def prefix(self, tower: Any) -> int:
        """None."""
        return 0

    def weigh_pooling(self, tower: Any, runtime: TowerRuntime, handle: Handle) -> None:
        """The attention pool."""
        if getattr(tower, "head", None) is not None:
            handle.before(tower.head.attention, PoolingMask(runtime))
