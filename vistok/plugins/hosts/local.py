"""A vision-language model of transformers from a local directory, with the few parameters that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vistok.hub import write_atomic
from vistok.image import Preprocess
from vistok.plugins.families.base import Family, family_of
from vistok.registry import register

TRAINED = "trained.safetensors"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@register("host", "local")
class LocalHost(nn.Module):
    """Any supported model of transformers, frozen but for its projector and, on request, LoRA in its language model.

    Its state is the trained part alone, so a checkpoint of a 7B model is a few megabytes.

    Args:
        path: Directory of the model with its processor (`AutoProcessor` and `AutoModelForImageTextToText` read it).
        projector: Train what lies between tower and language model.
        lora_rank: Rank of LoRA adapters (arXiv 2106.09685) on the language model's attention; 0 for none. Needs peft.
        lora_alpha: Their scale, times 1 / rank.
        lora_targets: Names of the linear layers that get one.
        dtype: Of the frozen weights; what is trained is always float32.
        gradient_checkpointing: Compute activations of the language model again in the backward pass.

    Raises:
        FileNotFoundError: No such directory.
        ValueError: Nothing would be trained, or no linear layer has one of the names.
    """

    registry_kind: ClassVar[str]
    registry_name: ClassVar[str]
    last_layer = None

    def __init__(
        self,
        *,
        path: str,
        projector: bool = True,
        lora_rank: int = 0,
        lora_alpha: int = 16,
        lora_targets: Sequence[str] = ATTENTION,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not projector and not lora_rank:
            raise ValueError("Nothing is left to train: set model.projector=true or model.lora_rank above 0.")
        self.model, self.processor = read(path, dtype, "model.path")
        self.family = family_of(self.model)
        if projector:
            projector_of(self.family, self.model).float().requires_grad_(True)
        self.adapted = bool(lora_rank)
        if lora_rank:
            _add_lora(self.family.text_model(self.model), lora_rank, lora_alpha, tuple(lora_targets))
        if gradient_checkpointing:
            checkpoint_layers(self.model)

    @property
    def preprocess(self) -> Preprocess:
        """Size of the pictures its processor makes."""
        images = self.processor.image_processor
        size: Any = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        get = size.get if isinstance(size, Mapping) else lambda key: getattr(size, key, None)
        height = get("height") or get("shortest_edge")
        if not height:
            raise ValueError(f"{type(images).__name__} makes pictures of no fixed size. Set data.image_size.")
        return Preprocess(size=(int(height), int(get("width") or height)))

    def forward(self, **inputs: Any) -> Any:
        """Run the model; see its own documentation."""
        return self.model(**inputs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        prefix = kwargs.get("prefix", "")
        whole = super().state_dict(*args, **kwargs)
        return {k: v for k, v in whole.items() if k.removeprefix(prefix) in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take trained parameters back; with `strict` they must be exactly those of `state_dict`.

        Raises:
            RuntimeError: They are not.
        """
        own = set(self.state_dict())
        if strict and own != set(state_dict):
            raise RuntimeError(f"Trained parameters differ: {sorted(own ^ set(state_dict))[:6]}.")
        return super().load_state_dict(dict(state_dict), strict=False, assign=assign)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the whole model with its processor, LoRA merged in, and the trained parameters beside it.

        Returns:
            The folder; `AutoModelForImageTextToText.from_pretrained` reads it.
        """
        from safetensors.torch import save

        folder = Path(folder)
        dtype = self.family.text_model(self.model).embed_tokens.weight.dtype
        table = {k: v.to(dtype) if v.is_floating_point() else v for k, v in _merged(self.model).items()}
        self.model.save_pretrained(folder, state_dict=table)
        self.processor.save_pretrained(folder)
        trained = {k.removeprefix("model."): v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        write_atomic(folder / TRAINED, save(trained, metadata={"format": "pt"}))
        return folder


def read(path: str | Path, dtype: str, key: str) -> tuple[Any, Any]:
    """A frozen model and its processor from a directory.

    Args:
        path: The directory.
        dtype: Of the weights.
        key: Of the recipe, for messages.

    Raises:
        FileNotFoundError: No model there.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (Path(path).expanduser() / "config.json").is_file():
        raise FileNotFoundError(f"{key}: {path} holds no model (no config.json). recipes/vlm says how to get one.")
    folder = str(Path(path).expanduser())
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.requires_grad_(False), AutoProcessor.from_pretrained(folder)


def projector_of(family: Family, model: Any) -> nn.Module:
    """What lies between a host's tower and its language model.

    Raises:
        TypeError: It is none of the modules that transformers' models call so.
    """
    for owner, name in ((family.base(model), "multi_modal_projector"), (family.base(model), "connector")):
        if isinstance(getattr(owner, name, None), nn.Module):
            return getattr(owner, name)  # type: ignore[no-any-return]
    if isinstance(getattr(family.tower(model), "merger", None), nn.Module):
        return family.tower(model).merger  # type: ignore[no-any-return]
    raise TypeError(f"{type(model).__name__} has no projector that is known here. Set model.projector=false, use LoRA.")


def checkpoint_layers(model: Any) -> None:
    """Make a model compute the activations of its layers again in the backward pass (of layers in training mode)."""
    switch = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.24 on
    if switch is not None:
        switch()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _add_lora(text: nn.Module, rank: int, alpha: int, targets: tuple[str, ...]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError("LoRA needs peft: pip install 'vistok[lora]' (or pip install peft).") from err
    known = {name.rsplit(".", 1)[-1] for name, part in text.named_modules() if isinstance(part, nn.Linear)}
    if not known.intersection(targets):
        raise ValueError(f"model.lora_targets: no linear layer is called {', '.join(targets)}. Known: {sorted(known)}.")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), text)
    for name, parameter in text.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _merged(model: Any) -> dict[str, Tensor]:
    """The state of a model with every LoRA product added to the weight it adapts, under the model's own names."""
    state: dict[str, Tensor] = model.state_dict()
    plain = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            for adapter in module.lora_A:
                weight = plain[f"{name}.weight"]
                plain[f"{name}.weight"] = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return plain
