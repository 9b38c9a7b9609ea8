"""transformers: DINOv2 (with and without registers) and the tower of InternVL: LayerScale in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vistok.plugins.families.clip_vit import refuse_flash
from vistok.plugins.families.encoder import Encoder, Step
from vistok.registry import register


@register("family", "dinov2_vit")
class Dinov2ViT(Encoder):
    """LayerScale and stochastic depth; a class token, then registers if there are any."""

    hosts = ("Dinov2Model", "Dinov2WithRegistersModel", "Dinov2Backbone", "Dinov2WithRegistersBackbone")
    qk = ("q_proj", "k_proj")

    def blocks(self, tower: Any) -> Sequence[Any]:
        """The layers."""
        encoder = tower.encoder
        return list(encoder.layer if hasattr(encoder, "layer") else encoder.layers)

    def prefix(self, tower: Any) -> int:
        """Class token and registers."""
        return 1 + int(getattr(tower.config, "num_register_tokens", 0))

    def attention(self, block: Any) -> Any:
        """`attention`."""
        return block.attention

    def heads(self, block: Any) -> int:
        """Query heads."""
        return int(block.attention.num_attention_heads)

    def scale(self, block: Any) -> float:
        """Factor of the logits."""
        return float(block.attention.scaling)

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """The attention branch."""
        step.refuse_mask(step.given.get("attention_mask", step.args[0] if step.args else None))
        given = {k: v for k, v in step.given.items() if k != "attention_mask"}
        found = block.attention(block.norm1(x), attention_mask=step.bias, **given)[0]
        branch: Tensor = block.drop_path(block.layer_scale1(found))
        return branch

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """The MLP branch."""
        found: Tensor = block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))
        return found

    def check(self, tower: Any) -> None:
        """Refuse flash attention."""
        refuse_flash(tower)


@register("family", "internvl_vit")
class InternViT(Encoder):
    """One class token; norms of queries and keys over all heads."""

    hosts = ("InternVLVisionModel",)
    qk = ("q_norm", "k_norm")

    def blocks(self, tower: Any) -> Sequence[Any]:
        """The layers."""
        return list(tower.encoder.layer)

    def attention(self, block: Any) -> Any:
        """`attention`."""
        return block.attention

    def attend(self, block: Any, x: Tensor, step: Step) -> Tensor:
        """The attention branch."""
        found: Tensor = block.lambda_1 * block.attention(block.layernorm_before(x), attention_mask=step.bias)[0]
        return found

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """The MLP branch."""
        found: Tensor = block.dropout(block.mlp(block.layernorm_after(x)))
        return found if block.lambda_2 is None else block.lambda_2 * found

    def check(self, tower: Any) -> None:
        """Refuse flash attention."""
        refuse_flash(tower)
