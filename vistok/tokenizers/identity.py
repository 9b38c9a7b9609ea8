"""The name of a tokenizer's weights, and what of it is stored beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vistok import hub
from vistok.config import check_value
from vistok.image import Preprocess


class Identified(hub.Saveable, nn.Module):
    """A module whose weights have a name that its tokens can carry, and whose preprocessing is saved with it.

    Attributes:
        decoder_parts: Names of submodules and parameters that only decoding uses; the model id leaves them out.
        preprocess: How pictures become its input.
    """

    decoder_parts: ClassVar[tuple[str, ...]] = ("decoder",)
    preprocess: Preprocess
    _model_id: str | None = None

    @property
    def model_id(self) -> str:
        """8 hex digits that name the encoder-to-ids weights; computed once (in evaluation mode), kept in `config.json`.

        Rounding the weights of a model in evaluation mode (`half()`, `to(torch.bfloat16)`) does not change it.
        """
        if self._model_id is not None:
            return self._model_id
        inside = {k: v for k, v in self.state_dict().items() if k.split(".")[0] not in self.decoder_parts}
        found = hub.model_id(inside)
        if not self.training:  # in training the weights go on changing
            self._model_id = found
        return found

    @model_id.setter
    def model_id(self, value: str) -> None:
        self._model_id = value

    def extra_config(self) -> dict[str, Any]:
        """Preprocessing and model id, stored in `config.json`."""
        return {"preprocess": dataclasses.asdict(self.preprocess), "model_id": self.model_id}

    def restore_extra(self, saved: Mapping[str, Any]) -> None:
        """Take up the stored preprocessing and model id."""
        if "preprocess" in saved:
            found = check_value(saved["preprocess"], Preprocess, "preprocess")
            if found.size != self.preprocess.size:
                raise hub.LoadError(
                    f"The stored preprocessing gives pictures of {found.size} (H, W), but the model's configuration is "
                    f"for {self.preprocess.size}. Make them agree in config.json."
                )
            self.preprocess = found
        if "model_id" in saved:
            self.model_id = check_value(saved["model_id"], str, "model_id")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`; forgets the model id, which belongs to the old weights."""
        self._model_id = None
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `half` and the like go through: the float32 weights give the name, before they are rounded."""
        first = next(self.parameters(), None)
        exact = first is not None and first.dtype == torch.float32 and not self.training and not first.is_meta
        if exact and fn(first.detach().new_empty(0)).dtype != torch.float32:
            _ = self.model_id
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """Switch to training; forgets the model id, since weights are about to change."""
        if mode:
            self._model_id = None
        return super().train(mode)
