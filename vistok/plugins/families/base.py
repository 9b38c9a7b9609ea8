"""`Family`: the five things the runtime has to know about a kind of host model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistok.compress.budget import HostShape
from vistok.compress.reduction import Reduction
from vistok.plugins.blocks import Block as Block
from vistok.plugins.blocks import Entry as Entry
from vistok.plugins.blocks import Patches as Patches
from vistok.plugins.blocks import Smaller as Smaller
from vistok.plugins.blocks import entry as entry
from vistok.plugins.blocks import grouped as grouped
from vistok.plugins.blocks import resized as resized
from vistok.plugins.blocks import square as square
from vistok.registry import list_names, registry

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
FIVE = (
    "text_model(model): the decoder stack with `.layers`",
    "placeholders(model): token id of each modality, {'image': id, 'video': id}",
    "tower(model): the vision module whose blocks run before the projection",
    "encode(model, kwargs): pixels to features, one (n, D) tensor per image",
    "blocks(model, output, kwargs, modality): how the tokens of an image lie on grids, and which are newlines",
)


class Family:
    """One kind of host model. Subclass, override what differs, and decorate with `@register("family", name)`.

    Attributes:
        hosts: Class names of the models it fits (subclasses of them fit too).
        mrope: Positions are three-dimensional, so they cannot be renumbered.
        consumed: Arguments that only the encoder reads.
        images_are_runs: An uninterrupted run of placeholders is one image, whatever the number of tiles it came in.
        withheld: What `needs` of a method the family cannot give, with the reason.
    """

    hosts: ClassVar[tuple[str, ...]] = ()
    mrope: ClassVar[bool] = False
    images_are_runs: ClassVar[bool] = False
    withheld: ClassVar[dict[str, str]] = {}
    consumed: ClassVar[tuple[str, ...]] = ("image_sizes", "image_sizes_videos", "batch_num_images")

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether a model is of this family."""
        return any(base.__name__ in cls.hosts for base in type(model).__mro__)

    def base(self, model: Any) -> nn.Module:
        """The model without its head, which splices features into the prompt."""
        found: nn.Module = model.base_model
        return found

    def text_model(self, model: Any) -> Any:
        """The decoder stack."""
        return model.base_model.language_model

    def tower(self, model: Any) -> Any:
        """The vision module."""
        return model.base_model.vision_tower

    def placeholders(self, model: Any) -> dict[str, int]:
        """Token id that stands for a feature, per modality."""
        config = model.config
        found = {"image": getattr(config, "image_token_id", None), "video": getattr(config, "video_token_id", None)}
        return {k: v for k, v in found.items() if v is not None}

    def encode(self, model: Any, kwargs: dict[str, Any], **extra: Any) -> dict[str, Any]:
        """Run the tower on the pixels among `kwargs`, exactly as `generate()` does.

        Args:
            model: The host.
            kwargs: Keyword arguments of its forward.
            extra: Further arguments of the tower.

        Returns:
            One output per modality that has pixels; features under `pooler_output`.
        """
        outputs = {}
        base = self.base(model)
        for modality, pixels in PIXELS.items():
            encoder = getattr(base, f"get_{modality}_features", None)
            if encoder is None or kwargs.get(pixels) is None:
                continue
            names = [n for n in inspect.signature(encoder).parameters if n != "kwargs"]
            given = {n: kwargs[n] for n in names if kwargs.get(n) is not None}
            outputs[modality] = encoder(**given, **extra, return_dict=True)
        return outputs

    def features(self, model: Any, output: Any) -> list[Tensor]:
        """Features of an encoder output, one (n, D) tensor per image."""
        pooled = output.pooler_output
        if isinstance(pooled, Tensor) and getattr(output, "uneven", None):
            return [image for row in pooled for image in row.split(output.uneven)]
        return list(pooled) if not isinstance(pooled, Tensor) or pooled.ndim == 3 else [pooled]

    def blocks(self, model: Any, output: Any, kwargs: dict[str, Any], modality: str) -> list[list[Block]]:
        """Grids of every entry of `features(model, output)`; by default each is one square grid."""
        return [[square(len(f))] for f in self.features(model, output)]

    def rebuilt(self, output: Any, features: list[Tensor]) -> Any:
        """An encoder output with other features, of the type the host expects."""
        if isinstance(output.pooler_output, Tensor):
            equal = len({len(f) for f in features}) == 1
            output.pooler_output = torch.stack(features) if equal else torch.cat(features).unsqueeze(0)
            output.uneven = None if equal else [len(f) for f in features]  # for `features`
        else:
            output.pooler_output = features
        return output

    def rebuild_extra(self, output: Any, reductions: list[Reduction]) -> None:
        """Reduce whatever else the encoder gives per token."""

    # what the tower says about its tokens

    def attentions(self, model: Any) -> list[Any]:
        """Attention modules of the tower's blocks, with `head_dim` and `q_proj`, `k_proj` or `qkv`.

        Raises:
            TypeError: The tower is built in another way.
        """
        tower = self.tower(model)
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        if layers is None or not hasattr(getattr(layers[0], "self_attn", None), "q_proj"):
            raise TypeError(
                f"The attention of a {type(tower).__name__} cannot be read from outside. Use a method that looks at "
                "features alone, such as divprune or pool."
            )
        return [layer.self_attn for layer in layers]

    def refuse(self, model: Any, name: str, needs: frozenset[str]) -> None:
        """Refuse a method that wants to know what this kind of host does not tell.

        Raises:
            TypeError: The message says what and why.
        """
        missing = dict(self.withheld)
        if not self.class_tokens(model):
            missing.setdefault("class_token", f"a {type(self.tower(model)).__name__} has none")
        for need in sorted(needs & set(missing)):
            raise TypeError(
                f"{name} needs {need.replace('_', ' ')}, which a {type(model).__name__} does not give: "
                f"{missing[need]}. Use another method, such as fastervlm or divprune"
                + (", or leave `reference` off." if need in ("class_token", "one_grid") else ".")
            )
        if needs & {"cls_row", "keys", "levels"}:
            self.attentions(model)
        if "class_token" in needs:
            self.feature_block(model)

    def block_number(self, model: Any, block: int, depth: int) -> int:
        """Block that a method means: from the end if negative, else scaled from a tower of 24 blocks."""
        return max(depth + block, 0) if block < 0 else min(round(block * depth / 24), depth - 1)

    def class_tokens(self, model: Any) -> int:
        """Class tokens in front of the patches: 1 or 0."""
        embeddings = getattr(self.tower(model), "embeddings", None)
        return int(hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token"))

    def projector(self, model: Any) -> Any:
        """The module that takes what the tower gives to the width of the language model, token by token."""
        return self.base(model).multi_modal_projector

    def feature_block(self, model: Any) -> Any:
        """The tower's block whose output goes to the projector."""
        layer = model.config.vision_feature_layer
        blocks = self.tower(model).encoder.layers
        if not isinstance(layer, int):
            raise TypeError(f"vision_feature_layer={layer}: the class token of several layers at once is not defined.")
        return blocks[layer if layer < 0 else layer - 1]

    def pooled(self, model: Any, patches: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Values per patch (tiles, P, C) as values per token (tiles, n, C): means, where patches are merged."""
        return patches

    def unprojected(self, model: Any, inputs: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Input of the projector with one row per token, (tiles, n, C)."""
        return inputs

    def spread(self, model: Any, kwargs: dict[str, Any], modality: str, tokens: Tensor) -> list[Tensor]:
        """Values per tile and token (tiles, n, C) laid out like the images' features, (N, C); 0 at newlines."""
        return list(tokens)

    def joined(self, model: Any) -> int:
        """Side of the square of the tower's patches that becomes one token."""
        return 1

    def in_order(self, model: Any, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Values per token in the order of the tower (tiles, n, C) in the order of the features."""
        return tokens

    def sources(
        self, model: Any, kwargs: dict[str, Any], modality: str, shape: tuple[int, int], device: torch.device
    ) -> list[Tensor]:
        """Token of the tower behind every feature of every image, (N,); -1 at newlines.

        Args:
            model: The host.
            kwargs: Its arguments.
            modality: image or video.
            shape: Tiles and tokens of a tile; tokens are numbered tile by tile.
            device: Where the numbers go.
        """
        numbers = torch.arange(1, shape[0] * shape[1] + 1, device=device).double().view(*shape, 1)
        laid = self.spread(model, kwargs, modality, self.in_order(model, numbers, kwargs))
        return [x[:, 0].round().long() - 1 for x in laid]

    def project(self, model: Any, tokens: Tensor) -> Tensor:
        """Rows of `unprojected`, (M, C), through the projector, (M, D)."""
        found: Tensor = self.projector(model)(tokens.unsqueeze(0))[0]
        return found

    def positions(self, model: Any, kwargs: dict[str, Any], *, generating: bool) -> Tensor:
        """Positions the host would give to the uncompressed prompt, (B, L) or (axes, B, L).

        Args:
            model: The host.
            kwargs: Its arguments.
            generating: `generate` starts to count at the first real token, `forward` at the first column.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and generating:
            counted: Tensor = (mask.long().cumsum(1) - 1).clamp_min(0)
            return counted
        first = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        return torch.arange(first.shape[1], device=first.device).expand(len(first), -1)

    def encode_smaller(
        self,
        model: Any,
        kwargs: dict[str, Any],
        count: Callable[[int], int],
        runs: dict[str, list[int]],
    ) -> dict[str, Smaller]:
        """Run the tower on pictures made smaller.

        Args:
            model: The host.
            kwargs: Keyword arguments with pixels.
            count: Tokens that an image of so many may become.
            runs: Lengths of the runs of placeholders of each modality, where a run is one image.

        Returns:
            What came out, per modality.

        Raises:
            TypeError: The family cannot.
        """
        raise TypeError(
            f"{type(self).__name__} cannot make pictures smaller before its tower. Use pool, or another host."
        )

    def tower_states(
        self, model: Any, kwargs: dict[str, Any], tiles: Tensor, **extra: Any
    ) -> tuple[Any, Tensor, tuple[Tensor, ...]]:
        """Tiles through the tower alone, for projectors that take one patch at a time.

        Args:
            model: The host.
            kwargs: Its arguments, which may choose other layers.
            tiles: Pixels, (T, C, H, W).
            extra: Further arguments of the tower.

        Returns:
            The tower's output, what the projector would get (T, P, C), and all hidden states with the class token.
        """
        config = model.config
        output = self.tower(model)(tiles, output_hidden_states=True, return_dict=True, **extra)
        states: tuple[Tensor, ...] = output.hidden_states
        layer = kwargs.get("vision_feature_layer") or config.vision_feature_layer
        hidden = torch.cat([states[i] for i in ([layer] if isinstance(layer, int) else layer)], dim=-1)
        if (kwargs.get("vision_feature_select_strategy") or config.vision_feature_select_strategy) == "default":
            hidden = hidden[:, 1:]
        return output, hidden, states

    def patches(self, model: Any, kwargs: dict[str, Any]) -> Patches:
        """Run the tower on the pictures, but not the projector.

        Raises:
            TypeError: The family's projector takes more than a patch at a time.
        """
        raise TypeError(f"{type(self).__name__} has no patches that go to its projector one by one.")

    def placed(self, model: Any, kwargs: dict[str, Any], patches: Patches, features: Tensor, side: int) -> Smaller:
        """Features of tiles that became smaller, laid out as the host lays out full ones.

        Args:
            model: The host.
            kwargs: Its arguments.
            patches: What they were made of.
            features: Of every tile, (T, M, D).
            side: Patches along each side of the window that one feature stands for.
        """
        raise TypeError(f"{type(self).__name__} has no patches that go to its projector one by one.")

    def host_shape(self, model: Any) -> HostShape:
        """Sizes of the language model."""
        config = self.text_model(model).config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return HostShape(
            depth=len(self.text_model(model).layers),
            width=config.hidden_size,
            mlp=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
        )

    def find_placeholders(self, model: Any, input_ids: Tensor | None, embeds: Tensor | None) -> dict[str, Tensor]:
        """Mask of the placeholders of each modality, (B, L); by embedding where there are no ids."""
        masks = {}
        for modality, token in self.placeholders(model).items():
            if input_ids is not None:
                masks[modality] = input_ids == token
            elif embeds is not None:
                row = model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                masks[modality] = (embeds == row.to(embeds.dtype)).all(-1)
        return masks


def is_host(model: nn.Module) -> bool:
    """Whether a model is a vision-language model of a known family."""
    return _fitting(model) is not None


def _fitting(model: nn.Module) -> type[Family] | None:
    for name in list_names("family"):
        _, builder, _ = registry("family").resolve(name)
        if issubclass(builder, Family) and builder.fits(model):  # type: ignore[arg-type, attr-defined]
            return builder  # type: ignore[return-value]
    return None


def family_of(model: nn.Module) -> Family:
    """The family of a host model.

    Raises:
        TypeError: No registered family fits; the message says what an adapter supplies.
    """
    found = _fitting(model)
    if found is not None:
        return found()
    supplied = "; ".join(f"({i}) {text}" for i, text in enumerate(FIVE, 1))
    raise TypeError(
        f"No family fits a {type(model).__name__}. Known: {', '.join(list_names('family')) or 'none'}. A family is a "
        f"small class that supplies five things: {supplied}. Subclass vistok.plugins.families.base.Family, set "
        '`hosts`, and decorate it with @vistok.registry.register("family", "my_name").'
    )
