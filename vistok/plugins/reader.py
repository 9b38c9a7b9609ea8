"""What a vision tower says about its tokens, noted while it runs with its own fast attention."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from vistok.compress.method import FeatureMethod
from vistok.compress.score import class_row, received_row
from vistok.plugins.families.base import Family
from vistok.plugins.handle import Handle

Kwargs = dict[str, Any]


class TowerReader:
    """Hooks on one run of a tower: queries and keys of a few blocks as they pass by, the projector's input.

    Nothing is computed twice and no attention map exists; towers with a class token give up one query row.

    Args:
        family: What is where.
        model: The host.
        method: What it wants to know.
    """

    def __init__(self, family: Family, model: Any, method: FeatureMethod) -> None:
        self.family, self.model, self.method = family, model, method
        self.handle = Handle()
        self.prefix = family.class_tokens(model)
        self.numbers: list[int] = []
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.calls: dict[int, Kwargs] = {}
        self.inputs: Tensor | None = None
        self.class_token: Tensor | None = None

    def __enter__(self) -> TowerReader:
        """Install the hooks."""
        needs, family = self.method.wanted(), self.family
        if needs & {"cls_row", "keys", "levels"}:
            attentions = family.attentions(self.model)
            self.numbers = [family.block_number(self.model, i, len(attentions)) for i in self.method.blocks]
            for i in set(self.numbers):
                self._watch(i, attentions[i])
        if self.method.at == "tower":
            self.handle.before(family.projector(self.model), self._note_inputs)
        if "class_token" in needs:
            self.handle.after(family.feature_block(self.model), self._note_class_token)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.handle.remove()

    def _watch(self, i: int, attn: Any) -> None:
        def note(store: dict[int, Tensor], rows: int | None) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Tensor) -> None:
                store[i] = output.detach()[:, :rows]

            return hook

        def split(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Tensor) -> None:
            q, k, _ = output.detach().chunk(3, dim=-1)
            self.queries[i], self.keys[i] = q.unsqueeze(0), k.unsqueeze(0)

        def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
            self.calls[i] = kwargs

        if hasattr(attn, "qkv"):
            self.handle.after(attn.qkv, split)
            self.handle.before(attn, arguments)
            return
        self.handle.after(getattr(attn, "q_norm", attn.q_proj), note(self.queries, self.prefix or None))
        self.handle.after(getattr(attn, "k_norm", attn.k_proj), note(self.keys, None))

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        self.inputs = args[0] if args else next(iter(kwargs.values()))

    def _note_class_token(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> None:
        self.class_token = (output[0] if isinstance(output, tuple) else output)[:, 0]

    def levels(self, kwargs: Kwargs, modality: str) -> list[tuple[list[Tensor], list[Tensor] | None]]:
        """Row and keys of every block, laid out like the features of the images: (n,) and (n, heads, d) each."""
        found = []
        with torch.no_grad():
            for i in self.numbers:
                head_dim = int(self.family.attentions(self.model)[i].head_dim)
                row = self._laid_out(self._row(i, head_dim).unsqueeze(-1), kwargs, modality)
                keys = None
                if "keys" in self.method.wanted():
                    raw = self.keys[i][:, self.prefix :].float()
                    keys = [k.unflatten(-1, (-1, head_dim)) for k in self._laid_out(raw, kwargs, modality)]
                found.append(([r[:, 0] for r in row], keys))
        return found

    def tower_tokens(self, kwargs: Kwargs, modality: str) -> list[Tensor]:
        """Input of the projector, laid out like the features of the images."""
        assert self.inputs is not None
        return self.family.spread(
            self.model, kwargs, modality, self.family.unprojected(self.model, self.inputs, kwargs)
        )

    def _laid_out(self, values: Tensor, kwargs: Kwargs, modality: str) -> list[Tensor]:
        tokens = self.family.pooled(self.model, values, kwargs)
        return self.family.spread(self.model, kwargs, modality, tokens)

    def _row(self, i: int, head_dim: int) -> Tensor:
        q, k = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (self.queries[i], self.keys[i]))
        scale, row = head_dim**-0.5, self.method.row
        if self.prefix:
            return class_row(q, k, scale=scale, row=row)
        if i not in self.calls:
            return received_row(q, k, scale=scale, row=row)
        given = self.calls[i]
        turn = sys.modules[type(self.family.attentions(self.model)[i]).__module__].apply_rotary_pos_emb_vision
        q, k = (t[0].transpose(0, 1) for t in (q, k))  # (L, heads, d)
        q, k = (t.transpose(0, 1).unsqueeze(0) for t in turn(q, k, *given["position_embeddings"]))
        lengths = given["cu_seqlens"].diff().tolist()  # every picture, and every frame of a clip, for itself
        pieces = zip(q.split(lengths, dim=2), k.split(lengths, dim=2))
        return torch.cat([received_row(a, b, scale=scale, row=row) for a, b in pieces], dim=1)
