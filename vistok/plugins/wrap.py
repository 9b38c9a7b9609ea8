"""Replacements for `generate` and `forward` on one instance: picklable objects with the signature of what they wrap."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vistok.plugins.attach import Plugin
    from vistok.plugins.packer import Packed


class Wrapper:
    """Stands in for a bound method of the host.

    Args:
        plugin: The plug-in in charge.
        original: The bound method.
    """

    def __init__(self, plugin: Plugin, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)  # type: ignore[arg-type]
        self.__wrapped__ = original  # transformers reads the signature through it
        self.plugin = plugin


class Generate(Wrapper):
    """`generate` that refuses what compression cannot do, before anything runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; see the host's own documentation."""
        refuse_generation(self.plugin, args, kwargs)
        if not self.plugin.method.shortens_prompt:
            return self.__wrapped__(*args, **kwargs)
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
            args = args[1:]
        if kwargs.get("inputs") is not None:
            kwargs["input_ids"] = kwargs.pop("inputs")
        return self.plugin.compressed(self.__wrapped__, args, kwargs, generating=True)


class Forward(Wrapper):
    """`forward` that compresses pictures before the language model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host; see its own documentation. Logits are those of the shortened prompt."""
        names = list(inspect.signature(self.__wrapped__).parameters)
        kwargs = {**dict(zip(names, args)), **kwargs}
        return self.plugin.compressed(self.__wrapped__, (), kwargs, generating=False)


def refuse_generation(plugin: Plugin, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse settings of `generate` that cannot work together with the method.

    Raises:
        ValueError: Chunked prefill, or a cache that entries cannot be taken out of.
    """
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or plugin.model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

    if setting("prefill_chunk_size") is not None:
        raise ValueError(
            "Chunked prefill shows a method only the first piece of the prompt. Remove prefill_chunk_size, or detach "
            "the plug-in for this call."
        )
    kind = setting("cache_implementation")
    if plugin.runtime.evicted and kind not in (None, "dynamic"):
        raise ValueError(
            f"{plugin.name} evicts cache entries, which a {kind!r} cache does not allow. Remove cache_implementation."
        )


def refuse_uneven(plugin: Plugin, packed: Packed, kwargs: dict[str, Any]) -> None:
    """Refuse to repeat samples whose features had to go into one flat tensor.

    Raises:
        ValueError: Beams or several sequences for a batch of pictures with different numbers of tokens, on a host that
            takes its features as one tensor.
    """
    config = kwargs.get("generation_config") or plugin.model.generation_config
    repeats = 1
    for name in ("num_beams", "num_return_sequences"):
        repeats *= (kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)) or 1
    if repeats == 1 or len(packed.index) == 1:
        return
    images = sum(map(len, packed.handover["before_sizes"]))
    for output in packed.kwargs["mm_encoder_outputs"].values():
        pooled = output.pooler_output
        if isinstance(pooled, torch.Tensor) and len(pooled) == 1 < images:
            raise ValueError(
                "Beams and several returned sequences need pictures with equal numbers of tokens in a batch here. "
                "Give the samples one by one."
            )
