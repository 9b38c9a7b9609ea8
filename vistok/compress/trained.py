"""`TrainedMethod`: a method whose tokens come out of a trained compressor instead of the host's projector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from vistok.compress.compressors.base import TrainedCompressor
from vistok.compress.method import FeatureMethod


class TrainedMethod(FeatureMethod):
    """Base of the methods with a compressor of their own; a subclass says which.

    How many tokens stay is a matter of the compressor, so there is no `keep`. Clips are left alone.

    Attributes:
        builder: Registered name of the compressors it takes.
    """

    merges = True
    trained = True
    at = "tower"
    needs = frozenset({"patches"})
    modalities = frozenset({"image"})
    door: ClassVar[dict[str, Any] | None] = None
    builder: ClassVar[str] = ""

    def __init__(self, compressor: str | nn.Module | None) -> None:
        super().__init__(keep=None)
        found = TrainedCompressor.from_pretrained(compressor).eval() if isinstance(compressor, str) else compressor
        if found is not None and not isinstance(found, TrainedCompressor):
            raise TypeError(f"compressor= takes a trained compressor or its folder, got a {type(found).__name__}.")
        if found is not None and found.registry_name != self.builder:
            raise ValueError(
                f"{self.builder} takes a compressor of that name, and this is a {found.registry_name}: "
                f"attach(model, {found.registry_name!r}, compressor=...)."
            )
        self.compressor = compressor if isinstance(compressor, str) else None if found is None else found.model_id
        self._module = found
        self._forward: Callable[..., Tensor] | None = found

    @property
    def module(self) -> TrainedCompressor:
        """The compressor.

        Raises:
            ValueError: None was given.
        """
        if self._module is None:
            raise ValueError(
                f"{self.builder} has weights of its own: give compressor=, a folder, `hf-hub:org/name`, or what "
                "vistok.load returned. recipes/vlm has recipes that train one."
            )
        return self._module

    @property
    def renumber(self) -> bool:
        """As the compressor was trained."""
        return self._module is not None and self._module.renumber

    def through(self, forward: Callable[..., Tensor]) -> None:
        """Call the compressor through a wrapper, such as that of distributed training."""
        self._forward = forward

    def tokens(self, features: Tensor, levels: Tensor, grid: tuple[int, ...], text: Tensor | None) -> Tensor:
        """What goes to the language model, (B, M, D); see `TrainedCompressor.forward`."""
        module = self.module
        if module.last_layer.device != features.device:
            module.to(features.device)
        assert self._forward is not None
        found: Tensor = self._forward(features, levels, grid=grid, text=text)
        return found.to(features.dtype)
