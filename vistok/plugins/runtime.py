"""The one runtime: hooks that shorten the sequence inside a language model and keep everything else right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.compress.method import Cut, Method
from vistok.compress.reduction import take
from vistok.compress.score import transition
from vistok.plugins import cache as kv
from vistok.plugins.call import ATTRIBUTE, Call, Stage
from vistok.plugins.deepstack import Deepstack
from vistok.plugins.families.base import PIXELS, Family
from vistok.plugins.handle import Handle
from vistok.plugins.layout import Columns, Prompt, build, find
from vistok.plugins.masks import layer_mask, real_tokens
from vistok.plugins.pictures import Pictures
from vistok.plugins.rows import attention_rows, received

Kwargs = dict[str, Any]


class Runtime:
    """Runs one method on one host.

    Args:
        model: The host.
        family: What is where in it.
        method: What to do.
    """

    def __init__(self, model: Any, family: Family, method: Method) -> None:
        self.model, self.family, self.method = model, family, method
        self.text = family.text_model(model)
        self.host = family.host_shape(model)
        self.depth = self.host.depth
        self.cuts: dict[int, tuple[int, Cut]] = {c.layer: (i, c) for i, c in enumerate(method.cuts(self.depth))}
        self.evicted = method.evicted_layers(self.depth)
        self.enabled = True
        self.call: Call | None = None  # of the forward that is running
        self.last: Call | None = None  # of the last forward, for the trace
        self.prompt: Prompt | None = None
        self.handover: dict[str, Any] = {}  # what the packer tells about a prompt it shortened
        self.labelled = False
        self.pictures: Pictures | None = None  # of the last prompt, for `show`

    def install(self, handle: Handle) -> None:
        """Register every hook, each recorded in the handle."""
        handle.before(self.model, self.before_model)
        handle.before(self.family.base(self.model), self.before_base)
        handle.before(self.text, self.before_text)
        handle.after(self.text, self.after_text, always=True)
        first = min([*self.cuts, *self.evicted], default=self.depth)
        sources = {cut.source for _, cut in self.cuts.values() if cut.source is not None and cut.source != cut.layer}
        watched = self.method.accumulate(self.depth)
        for i, layer in enumerate(self.text.layers):
            if i >= first:
                handle.before(layer, LayerHook(self, i))
            if i in sources or i in self.evicted or i in watched:
                handle.after(layer.self_attn, AttentionHook(self, i))
            if i in watched:
                handle.after(layer.mlp, MlpHook(self, i))
            if self.cuts and hasattr(self.family.tower(self.model), "deepstack_merger_list"):
                handle.after(layer, Deepstack(self, i))

    # hooks around the language model

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        """Note whether labels were given: only then the full length is restored."""
        self.labelled = kwargs.get("labels") is not None

    def before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, ...] | None:
        """Encode pictures as `generate()` does, so that the size of every image is known, and find placeholders."""
        self.prompt = None
        if not self.enabled:
            return None
        input_ids = args[0] if args else kwargs.get("input_ids")
        outputs = kwargs.get("mm_encoder_outputs") or {}
        changed = False
        if any(kwargs.get(name) is not None for name in PIXELS.values()):
            outputs = {**outputs, **self.family.encode(self.model, kwargs)}
            kwargs = {k: v for k, v in kwargs.items() if k not in PIXELS.values()} | {"mm_encoder_outputs": outputs}
            changed = True
        outputs = {k: v for k, v in outputs.items() if v is not None}
        if outputs:
            masks = self.family.find_placeholders(self.model, input_ids, kwargs.get("inputs_embeds"))
            sizes = {k: [len(f) for f in self.family.features(self.model, v)] for k, v in outputs.items()}
            masks = {k: m for k, m in masks.items() if k in sizes}
            self.prompt = find(masks, sizes, runs=self.family.images_are_runs)
            if not self.handover:
                counts = [len(row) for row in self.prompt.images.get("image", [])]
                self.pictures = Pictures.of(self, outputs, kwargs, counts)
        return (args, kwargs) if changed else None

    def before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, ...] | None:
        """Tell prefill from decoding and set up the state of the call."""
        cache = kv.given_cache(kwargs)
        prompt, self.prompt = self.prompt, None
        handover = self.handover
        used = cache is not None and bool(cache.get_seq_length() > 0)
        if used:
            self.call = getattr(cache, ATTRIBUTE, None)
        else:
            self.call = self._begin(prompt, kwargs, handover)
        if not used or self.call is not None:
            self.last = self.call  # a new prompt without pictures leaves no trace of the one before
        if self.call is None:
            return None
        self.call.prefill = not used
        self.call.memo = {}
        if self.call.prefill and self.evicted and cache is not None:
            kv.refuse(cache, self.evicted)
        return Deepstack.take_over(self, args, kwargs) if self.call.prefill else None

    def _begin(self, prompt: Prompt | None, kwargs: Kwargs, handover: dict[str, Any]) -> Call | None:
        embeds = kwargs.get("inputs_embeds")
        if not self.enabled or prompt is None or embeds is None:
            return None
        with torch.no_grad():
            real = real_tokens(kwargs.get("attention_mask"), embeds.shape[0], embeds.shape[1], embeds.device)
            handover = _expanded(handover, *real.shape)
            columns = build(prompt, real, handover.pop("protect", None))
            call = Call(depth=self.depth, start=columns, scope=self.method.scope, restore=self.labelled, **handover)
            view = call.view(columns, hidden=embeds)
            call.row_mask = self.method.rows(view)
            if call.row_mask is not None:
                call.rows = int(call.row_mask.sum(1).max())
            if len(self.method.accumulate(self.depth)):
                call.transitions = torch.zeros(real.shape, device=real.device)
        return call

    def after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> Any:
        """Shrink the cache, restore the length if asked to, and forget what belongs to this forward."""
        call, self.call = self.call, None
        if call is None:
            return None
        call.memo, call.attention = {}, {}
        if output is None:  # the forward failed: nothing to shape
            call.received = {}
            return None
        cache = output[1] if isinstance(output, tuple) and len(output) > 1 else kv.returned_cache(output)
        cache = cache if hasattr(cache, "layers") else kv.given_cache(kwargs)
        if cache is not None:
            setattr(cache, ATTRIBUTE, call)
            if call.prefill and self.evicted:
                kv.evict(self, call, cache)
            call.lengths = [int(cache.get_seq_length(i)) for i in range(self.depth)]
        call.received = {}
        if call.prefill and call.restore and call.stages:
            return restore(call, output)
        return None

    # hooks on layers

    def before_layer(self, i: int, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, ...] | None:
        """Cut if a cut is due, and give the layer masks and positions of the sequence it really sees."""
        call = self.call
        if call is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        given = kwargs
        if call.prefill and i in self.cuts:
            hidden = self._cut(call, i, hidden, kwargs)
        if not (any(s.layer <= i for s in call.stages) if call.prefill else call.changed_at(i)):
            return None
        columns = call.columns_at(i) if call.prefill else call.cached_at(i)
        kwargs = self._kwargs(call, i, hidden, columns, given)
        if not args:
            return (), kwargs | {"hidden_states": hidden}
        return (hidden, *args[1:]), kwargs

    def _kwargs(self, call: Call, i: int, hidden: Tensor, columns: Columns, given: Kwargs) -> Kwargs:
        cache = kv.given_cache(given)
        valid = None if columns.full else columns.valid
        mask = layer_mask(self.text.config, i, hidden, cache, valid, call.memo)
        tables, positions = self._positions(call, hidden, columns, given)
        if "flash" in str(self.text.config._attn_implementation):
            positions = None  # gapped ids would look like packed sequences
        return given | {"attention_mask": mask, "position_embeddings": tables, "position_ids": positions}

    def _positions(self, call: Call, hidden: Tensor, columns: Columns, given: Kwargs) -> tuple[Any, Any]:
        """Rotary tables and position ids of the columns (prefill) or of the new tokens (decoding)."""
        tables: Any = given.get("position_embeddings")
        positions: Any = given.get("position_ids")
        if columns is call.start or (not call.prefill and not self.method.renumber):
            return tables, positions
        key = ("positions", id(columns))
        if key not in call.memo:
            if not call.prefill:
                moved = positions - columns.dropped
                call.memo[key] = (self.text.rotary_emb(hidden, moved), moved)
            elif self.method.renumber:
                moved = (columns.valid.cumsum(1) - 1).clamp_min(0)
                call.memo[key] = (self.text.rotary_emb(hidden, moved), moved)
            else:
                gathered = tuple(take(table, columns.index) for table in tables)
                if positions is not None:
                    positions = take(positions.expand(len(columns.index), -1), columns.index)
                call.memo[key] = (gathered, positions)
        found: tuple[Any, Any] = call.memo[key]
        return found

    def _cut(self, call: Call, i: int, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """Let the method decide in front of layer i and shorten the sequence."""
        number, cut = self.cuts[i]
        columns = call.columns_at(i)
        if not any(any(row) for row in columns.counts):
            return hidden
        with torch.no_grad():
            view = call.view(columns, layer=i, stage=number, hidden=hidden)
            self._score(call, cut, columns, view, hidden, kwargs)
            decision = self.method.reduce(view, self.host)
        if decision.reduction is None:
            return hidden
        reduction = decision.reduction
        with torch.no_grad():
            shorter = columns.gather(reduction.index, reduction.valid, decision.counts)
            if call.scope == "row":
                counts = call.counts_by_image(decision.counts, shorter)
                shorter = columns.gather(reduction.index, reduction.valid, counts)
        call.stages.append(Stage(layer=i, columns=shorter))
        return reduction.apply(hidden)

    def _score(self, call: Call, cut: Cut, columns: Columns, view: Any, hidden: Tensor, kwargs: Kwargs) -> None:
        """Put what the method asked for into the view."""
        if call.transitions is not None:
            view.transitions = take(call.transitions, columns.index)
        if cut.source is None or call.rows == 0:
            return
        tables, positions = self._positions(call, hidden, columns, kwargs)
        view.row_index, view.row_valid = call.row_columns(columns)
        view.angles = getattr(self.text.rotary_emb, "inv_freq", None)
        view.positions = positions if positions is None or positions.ndim == 2 else None
        if cut.source == cut.layer:
            layer = self.text.layers[cut.layer]
            x = layer.input_layernorm(hidden)
            view.attention = attention_rows(layer.self_attn, x, view.row_index, columns.valid, tables, None)
        else:
            view.attention = call.attention.pop(cut.source)

    def after_attention(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> None:
        """Read rows and transitions of a layer that has just run."""
        call = self.call
        if call is None or not call.prefill:
            return
        x = args[0] if args else kwargs["hidden_states"]
        columns = call.columns_at(i)
        tables, cache = kwargs["position_embeddings"], kv.given_cache(kwargs)
        with torch.no_grad():
            if i in self.method.accumulate(self.depth):
                self._add_transition(call, columns, x, output[0])
            if call.rows and any(cut.source == i != cut.layer for _, cut in self.cuts.values()):
                index, _ = call.row_columns(columns)
                call.attention[i] = attention_rows(module, x, index, columns.valid, tables, cache)
            if i in self.evicted and cache is not None:
                window = self.method.window(call.view(columns, layer=i))
                if window is not None:
                    rows = kv.window_rows(window, call, columns)
                    call.received[i] = received(module, x, *rows, columns.valid, tables, cache)

    def after_mlp(self, i: int, args: tuple[Any, ...], output: Tensor) -> None:
        """Add the MLP's transition."""
        if self.call is not None and self.call.prefill:
            with torch.no_grad():
                self._add_transition(self.call, self.call.columns_at(i), args[0], output)

    def _add_transition(self, call: Call, columns: Columns, before: Tensor, after: Tensor) -> None:
        assert call.transitions is not None
        term = transition(before, after, columns.valid, self.method.direction)
        call.transitions.scatter_add_(1, columns.index, term)


def _expanded(handover: dict[str, Any], batch: int, length: int) -> dict[str, Any]:
    """What the packer told about each sample, for as many beams or returned sequences as there are.

    Without a cache every step runs the whole sequence: columns after the prompt are new tokens.
    """
    if "before" not in handover:
        return dict(handover)
    times = batch // len(handover["before"])
    found: dict[str, Any] = {
        k: v.repeat_interleave(times, 0) if isinstance(v, Tensor) else [row for row in v for _ in range(times)]
        for k, v in handover.items()
    }
    new = length - found["source"].shape[1]
    if new > 0:
        steps = torch.arange(1, new + 1, device=found["source"].device)
        found["source"] = torch.cat([found["source"], found["source"][:, -1:] + steps], dim=1)
        found["protect"] = F.pad(found["protect"], (0, new))
    return found


class LayerHook:
    """Pre-hook of one decoder layer; an object so that models with a plug-in can be copied and pickled."""

    def __init__(self, runtime: Runtime, layer: int) -> None:
        self.runtime, self.layer = runtime, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, ...] | None:
        """Hand over to `Runtime.before_layer`."""
        return self.runtime.before_layer(self.layer, args, kwargs)


class AttentionHook:
    """Forward hook of one attention module."""

    def __init__(self, runtime: Runtime, layer: int) -> None:
        self.runtime, self.layer = runtime, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> None:
        """Hand over to `Runtime.after_attention`."""
        self.runtime.after_attention(self.layer, module, args, kwargs, output)


class MlpHook:
    """Forward hook of one MLP."""

    def __init__(self, runtime: Runtime, layer: int) -> None:
        self.runtime, self.layer = runtime, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> None:
        """Hand over to `Runtime.after_mlp`."""
        self.runtime.after_mlp(self.layer, args, output)


def restore(call: Call, output: Any) -> Any:
    """Put the last hidden states back at full length, zeros where tokens went, so that labels line up."""
    hidden = output[0]
    columns = call.columns_at(call.depth - 1)
    full = hidden.new_zeros(hidden.shape[0], call.start.index.shape[1], hidden.shape[2])
    index = columns.index.unsqueeze(-1).expand_as(hidden)
    full = full.scatter_add(1, index, hidden * columns.valid.unsqueeze(-1).to(hidden.dtype))
    if isinstance(output, tuple):
        return (full, *output[1:])
    output.last_hidden_state = full
    return output
