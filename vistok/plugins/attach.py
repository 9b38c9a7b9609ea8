"""`vistok.attach`: put a compression method on a host model, and take it off again."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vistok.compress.method import FeatureMethod, Method
from vistok.compress.trace import Trace
from vistok.compress.trained import TrainedMethod
from vistok.compress.vision import VisionMethod
from vistok.config import create, read_yaml
from vistok.plugins.cache import given_cache, returned_cache
from vistok.plugins.compressed import refuse_misfit
from vistok.plugins.families.base import Family, family_of, is_host
from vistok.plugins.families.encoder import encoder_of
from vistok.plugins.handle import Attached, Handle
from vistok.plugins.packer import PROMPT, continue_prompt, prepare, put_back, step
from vistok.plugins.paint import paint
from vistok.plugins.report import Report, build_report
from vistok.plugins.rows import can_score
from vistok.plugins.runtime import Runtime
from vistok.plugins.vision import TowerPlugin
from vistok.plugins.wrap import Forward, Generate, refuse_uneven
from vistok.registry import list_names, registry

OWNER = "_vistok_plugin"


class Plugin(Attached):
    """A method at work on a host. Use it as a context manager, or keep it and call `detach()`.

    Attributes:
        model: The host.
        method: The method.
        name: Registered name of the method.
        family: What kind of host it is.
    """

    runtime: Runtime

    def __init__(self, model: Any, family: Family, method: Method) -> None:
        self.model, self.family, self.method = model, family, method
        self.name: str = getattr(method, "registry_name", type(method).__name__)
        self.runtime = Runtime(model, family, method)
        self.handle = Handle()
        self._inside = False  # generate() calls forward(): compress once

    def prepare(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments with compressed features and a shortened prompt, for `forward` or `generate` of a bare host.

        What `generate` does by itself while the plug-in is attached; for pipelines that call the host elsewhere.

        Args:
            inputs: What a processor gives: ids, mask, pixels.

        Raises:
            ValueError: The method does nothing before the language model.
        """
        if not self.method.shortens_prompt:
            raise ValueError(f"{self.name} works inside the language model: there is nothing to prepare.")
        packed = prepare(self.runtime, dict(inputs))
        return dict(inputs) if packed is None else packed.kwargs

    def compressed(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, generating: bool
    ) -> Any:
        """Run the host's `generate` or `forward` on a compressed prompt."""
        if self._inside:
            return call(*args, **kwargs)
        cache = given_cache(kwargs)
        used = cache is not None and bool(cache.get_seq_length() > 0)
        packed = getattr(cache, PROMPT, None) if used else None
        if used and packed is None:
            return call(*args, **kwargs)
        if packed is not None:
            short = continue_prompt(packed, kwargs, self.name) if generating else step(packed, kwargs, cache)
            packed = dataclasses.replace(packed, input_ids=kwargs.get("input_ids"), short_ids=short.get("input_ids"))
        else:
            packed = prepare(self.runtime, kwargs, generating=generating) if self.runtime.enabled else None
            if packed is None:
                return call(*args, **kwargs)
            short = packed.kwargs
            if generating:
                refuse_uneven(self, packed, kwargs)
            self.runtime.handover = dict(packed.handover)
        self._inside = True
        try:
            output = call(*args, **short)
        finally:
            self._inside = False
            self.runtime.handover = {}
        cache = returned_cache(output)
        if cache is not None and not used:
            setattr(cache, PROMPT, packed)
        return put_back(packed, output) if generating else output

    @property
    def trace(self) -> Trace:
        """Tokens entering each layer and cached per layer, per sample, of the last call.

        Raises:
            RuntimeError: No prompt with pictures has run yet.
        """
        if self.runtime.last is None:
            raise RuntimeError("There is no trace yet: run the model on a prompt with a picture first.")
        return self.runtime.last.trace()

    def show(self, image: Any, sample: int = 0, number: int = 0) -> Any:
        """Paint what became of a picture's tokens over it: dropped ones dark, merged ones in one colour.

        Args:
            image: The picture (PIL, or float (3, H, W) in [0, 1]) as it was cropped for the model.
            sample: Sample of the last call.
            number: Picture of that sample.

        Raises:
            RuntimeError: No prompt with pictures has run yet.
            ValueError: There is no such picture, or its tokens lie on no single grid.
        """
        call, pictures = self.runtime.last, self.runtime.pictures
        if call is None or pictures is None:
            raise RuntimeError("There is nothing to show yet: run the model on a prompt with a picture first.")
        samples = len(call.start.counts)
        mine = sample * len(pictures.counts) // samples  # beams and returned sequences share their sample's pictures
        if not (0 <= sample < samples and 0 <= number < pictures.counts[mine]):
            raise ValueError(f"There is no picture {number} of sample {sample}: the samples have {pictures.counts}.")
        last = call.columns_at(call.depth - 1)
        kept = last.place[sample][last.segment[sample] == number]
        slots, sizes = pictures.fate(self.runtime, sum(pictures.counts[:mine]) + number, kept)
        return paint(image, slots, sizes)

    def report(self) -> Report:
        """Tokens per layer, FLOPs and cache bytes of the last call, with and without the method."""
        return build_report(self.name, self.method.config(), self.trace, self.runtime.host, self._element_size())

    def _element_size(self) -> int:
        dtype = next(self.runtime.text.parameters()).dtype
        return int(dtype.itemsize)

    def _install(self) -> None:
        try:
            self.runtime.install(self.handle)
            self.handle.attribute(self.model, OWNER, self)
            if hasattr(self.model, "generate"):
                self.handle.attribute(self.model, "generate", Generate(self, self.model.generate))
            if self.method.shortens_prompt:
                self.handle.attribute(self.model, "forward", Forward(self, self.model.forward))
        except BaseException:
            self.handle.remove()
            raise


def attach(model: nn.Module, method: str | Mapping[str, Any] | Method, **config: Any) -> Any:
    """Compress a host's image tokens with a method.

    Everything is checked first; if a check fails nothing has changed.

    Args:
        model: Any supported vision-language model of transformers, unmodified; or, for methods of the `vision` stage, a
            vision transformer of timm, open_clip or transformers, alone or inside another model.
        method: Registered name, a mapping `{name: ..., ...}`, the path of a YAML file with one, or a built method.
        **config: Settings of the method. `keep` is the number of image tokens left after the last cut: an int per
            image, a float share, or a `Budget`.

    Returns:
        The `Plugin` (a `TowerPlugin` on a vision transformer); leaving its `with` block (or `detach()`) undoes
        everything.

    Raises:
        TypeError: No family fits the model, or the method cannot run on it.
        ValueError: Settings that do not fit, or a model that already has a plug-in.

    Example:
        >>> with vistok.attach(model, "fastv", keep=0.25) as plugin:      # doctest: +SKIP
        ...     out = model.generate(**inputs)
        ...     print(plugin.report())
    """
    built = _method(method, config)
    carried = plugin_of(model)
    if carried is not None:
        raise ValueError(f"This model already carries {carried.name!r}. Detach it first; plug-ins do not nest.")
    if not is_host(model):
        return _attach_tower(model, built)
    plugin = Plugin(model, family_of(model), built)
    check(plugin)
    plugin._install()
    return plugin


def _attach_tower(model: nn.Module, method: Method) -> TowerPlugin:
    if not isinstance(method, VisionMethod) or method.stages != {"vision"}:
        name = getattr(method, "registry_name", type(method).__name__)
        if not any(encoder_of(module) for module in model.modules()):
            family_of(model)  # says what is missing
        raise TypeError(
            f"{name} works at {', '.join(sorted(method.stages))}, which needs a language model, and no family of hosts "
            f"fits a {type(model).__name__}. In a vision transformer alone use a method of the stage vision: "
            f"{', '.join(alone())}."
        )
    tower = TowerPlugin(model, method)
    tower.install(OWNER)
    return tower


def alone() -> list[str]:
    """Names of the methods that work in a vision transformer without a language model."""
    builders = {name: registry("method").resolve(name)[1] for name in list_names("method")}
    return [name for name, builder in builders.items() if getattr(builder, "stages", None) == {"vision"}]


def plugin_of(model: nn.Module) -> Any:
    """The plug-in a model carries (copies of a model carry a copy), None if it has none."""
    return vars(model).get(OWNER)


def _method(method: str | Mapping[str, Any] | Method, config: dict[str, Any]) -> Method:
    if isinstance(method, Method):
        if config:
            raise ValueError(f"{type(method).__name__} is built already; settings {sorted(config)} come too late.")
        return method
    if isinstance(method, Mapping):
        config = {**method, **config}
        if not isinstance(config.get("name"), str):
            raise ValueError(f"A method as a mapping needs its name: {{name: fastv, ...}}, got {dict(method)}.")
        method = config.pop("name")
    name = str(method)
    if name.endswith((".yaml", ".yml")):
        return _method(read_yaml(name), config)
    built: Method = create("method", name, **config)
    return built


def check(plugin: Plugin) -> None:
    """Refuse what cannot work, before anything is changed.

    Raises:
        TypeError: Attention of a kind that rows cannot be read from, signals that the host does not give.
        ValueError: Renumbering under three-dimensional positions, chunked prefill.
    """
    method, runtime = plugin.method, plugin.runtime
    if isinstance(method, FeatureMethod):
        plugin.family.refuse(plugin.model, plugin.name, method.wanted())
    if isinstance(method, TrainedMethod):
        refuse_misfit(runtime, plugin.name)
    if plugin.family.mrope and method.renumber:
        raise ValueError(
            f"{plugin.name} renumbers positions here, which three-dimensional positions do not allow. "
            "Leave `reference` off: positions are then kept."
        )
    reads = [cut.source for _, cut in runtime.cuts.values() if cut.source is not None] + list(runtime.evicted)
    for i in reads:
        attn = runtime.text.layers[i].self_attn
        if not can_score(attn):
            raise TypeError(
                f"{plugin.name} reads attention rows, and layer {i} is a {type(attn).__name__} without separate "
                "q_proj, k_proj and rotary positions. Use a method that reads no attention, such as random or pool."
            )
    if "mm_encoder_outputs" not in inspect.signature(plugin.model.forward).parameters:
        raise TypeError(
            f"{type(plugin.model).__name__} takes no mm_encoder_outputs. Update transformers to 5.20 or newer."
        )
    if any(getattr(layer.self_attn, "sliding_window", None) for layer in runtime.text.layers) and runtime.cuts:
        warnings.warn(
            "Some layers attend to a sliding window. After a cut the window counts the tokens that are left, so it "
            "reaches further back than in the unpruned model.",
            stacklevel=3,
        )
    chunk = getattr(getattr(plugin.model, "generation_config", None), "prefill_chunk_size", None)
    if chunk is not None:
        raise ValueError(
            f"generation_config.prefill_chunk_size={chunk}: chunked prefill shows a method only the first piece of the "
            "prompt. Set it to None."
        )
