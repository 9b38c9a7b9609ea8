"""Residual quantisation: several quantizers of any kind, each on what the ones before left over."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from vistok.config import Of, Spec, create
from vistok.distributed import from_first
from vistok.quantizers.base import Positions, Quantized, Quantizer, require_positive
from vistok.quantizers.search import TILE
from vistok.quantizers.vq import TableQuantizer
from vistok.registry import register

BEAMS = (16, 256)
"""Widths of the search for the ids of a sum; the second is tried for the tokens the first leaves open."""


def sum_terms(parts: list[dict[str, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    """Sum of loss terms by name, times scale."""
    total: dict[str, Tensor] = {}
    for losses in parts:
        for name, term in losses.items():
            total[name] = total[name] + scale * term if name in total else scale * term
    return total


def build_level(spec: Spec) -> Quantizer:
    """One quantizer that can be stacked: it has ids and maps D channels to D channels.

    Raises:
        ValueError: A continuous quantizer, one with ids of its own count, or one that changes the width.
    """
    level: Quantizer = create("quantizer", **spec)
    if not level.vocab_sizes or level.in_dim != level.dim or level.num_ids(4) != 4:
        raise ValueError(
            f"{spec['name']!r} cannot be a residual level: a level needs ids, one per position, and as many channels "
            f"out as in (got {level.in_dim} in, {level.dim} out, {len(level.vocab_sizes)} ids)."
        )
    level.usage = None  # the wrapper tracks all levels
    return level


@register("quantizer", "residual")
class ResidualQuantizer(Quantizer):
    """Residual quantisation around any kind (SoundStream, arXiv 2107.03312, algorithm 1; RQ-VAE, arXiv 2203.01941).

    r_0 = z; q_l = Q_l(r_l); r_{l+1} = r_l - sg q_l; code = sum q_l. Each level has a quantizer of its own and passes
    its straight-through gradient to z, so the gradient of the code to z is `layers` times the identity, as in
    vector-quantize-pytorch. Loss terms are sums over levels, weights those of the base. Ids (B, N, L * G) with G the
    ids of one level.

    With `quantize_dropout` a training step uses only the first levels, their number drawn once for all processes;
    the ids of the others are what they would have been (never -1), their codes, losses and statistics are left out.

    Args:
        base: The quantizer of each level.
        layers: Levels, L.
        level_scale: Level l quantises r_l / level_scale^l and is scaled back; 0.5 makes residual LFQ.
        quantize_dropout: Train on random numbers of levels.
        dropout_keep: Smallest number of levels kept.

    Example:
        >>> import torch, vistok
        >>> q = vistok.create("quantizer", "residual", base={"name": "vq", "codebook_size": 64, "dim": 8}, layers=4)
        >>> q(torch.randn(2, 16, 8)).ids.shape
        torch.Size([2, 16, 4])
    """

    def __init__(
        self,
        *,
        base: Annotated[Spec, Of("quantizer")],
        layers: int,
        level_scale: float = 1.0,
        quantize_dropout: bool = False,
        dropout_keep: int = 1,
    ) -> None:
        levels = [build_level(base) for _ in range(require_positive("layers", layers))]
        if not 1 <= dropout_keep <= layers:
            raise ValueError(f"dropout_keep must lie in 1 .. {layers}, got {dropout_keep}.")
        if level_scale <= 0:
            raise ValueError(f"level_scale must be positive, got {level_scale}.")
        super().__init__(levels[0].dim, levels[0].vocab_sizes * layers)
        self.levels = nn.ModuleList(levels)
        self.level_scale = level_scale
        self.quantize_dropout = quantize_dropout
        self.dropout_keep = dropout_keep
        self.weights = dict(levels[0].weights)

    def _stack(self) -> list[tuple[Quantizer, float]]:
        stack = []
        for index, level in enumerate(self.levels):
            assert isinstance(level, Quantizer)
            level.weights = self.weights  # a level looks there for the terms it has to compute
            stack.append((level, self.level_scale**index))
        return stack

    def draw_active(self, z: Tensor, generator: torch.Generator | None) -> int:
        """Number of levels this step uses; the same on all processes."""
        if not (self.training and self.quantize_dropout):
            return len(self.levels)
        drawn = torch.randint(self.dropout_keep, len(self.levels) + 1, (1,), generator=generator, device=z.device)
        return int(from_first(drawn))

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        return self.quantize_levels(z, positions, generator, self.draw_active(z, generator))

    def quantize_levels(
        self, z: Tensor, positions: Positions, generator: torch.Generator | None, active: int
    ) -> Quantized:
        """Quantise with the first `active` levels; the others only give ids."""
        rest, codes = z, torch.zeros_like(z)
        ids, losses = [], []
        for index, (level, scale) in enumerate(self._stack()):
            if index < active:
                out = level.quantize(rest / scale, positions, None, generator)
                codes = codes + out.codes * scale
                losses.append(out.losses)
            else:
                out = _ids_only(level, rest.detach() / scale)
                # keeps parameters of an unused level in the graph: DDP wants a gradient for each
                codes = codes + 0.0 * sum((p.sum() for p in level.parameters()), start=z.new_zeros(()))
            rest = rest - out.codes.detach() * scale
            assert out.ids is not None
            ids.append(level.grouped(out.ids))
        return self.result(codes, self.ungrouped(torch.cat(ids, dim=-1)), sum_terms(losses))

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Sum of the codes of all levels: int64 (B, N, L * G) -> (B, N, D) float32.

        Raises:
            ValueError: Wrong number of levels, or an id outside the vocabulary.
        """
        per_level = self.grouped(self.check_ids(ids)).chunk(len(self.levels), dim=-1)
        codes = torch.zeros((), device=ids.device)
        for (level, scale), part in zip(self._stack(), per_level):
            codes = codes + level.ids_to_codes(level.ungrouped(part)) * scale
        return codes

    @torch.no_grad()
    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids whose codes sum to the given ones: (B, N, D) -> int64 (B, N, L * G).

        A sum does not always tell its terms. The search is greedy, or by a beam over the tables, and its result is
        decoded again: what is returned is exact.

        Raises:
            ValueError: Wrong number of channels, or codes whose ids were not found.
        """
        codes = self.check_codes(codes)
        flat = codes.reshape(-1, self.dim)
        tables = all(isinstance(level, TableQuantizer) for level in self.levels)
        ids = self._beam_ids(flat) if tables else self._greedy_ids(flat)
        ids = self.ungrouped(ids.reshape(*codes.shape[:-1], len(self.vocab_sizes)))
        if not torch.allclose(self.ids_to_codes(ids), codes, rtol=1e-4, atol=1e-5):
            raise ValueError(
                "These codes are no sum of codes of the levels, or their ids were not found. Keep the ids."
            )
        return ids

    def _greedy_ids(self, flat: Tensor) -> Tensor:
        rest, ids = flat.unsqueeze(0), []
        for level, scale in self._stack():
            found = level.codes_to_ids(rest / scale)
            rest = rest - level.ids_to_codes(found) * scale
            ids.append(level.grouped(found)[0])
        return torch.cat(ids, dim=-1)

    def _beam_ids(self, flat: Tensor) -> Tensor:
        """Rows of the tables that sum to the codes, by beam search: (M, D) -> (M, L)."""
        ids = torch.zeros(len(flat), len(self.levels), dtype=torch.int64, device=flat.device)
        open_rows = torch.arange(len(flat), device=flat.device)
        for width in BEAMS:
            for rows in open_rows.split(max(1, 2 * TILE // (width * self.vocab_sizes[0]))):
                ids[rows] = self._beam(flat[rows], width)
            wrong = (self.ids_to_codes(self.ungrouped(ids[open_rows])) - flat[open_rows]).abs().amax(-1) > 1e-5
            open_rows = open_rows[wrong]
        return ids

    def _beam(self, flat: Tensor, width: int) -> Tensor:
        rest, ids = flat.unsqueeze(1), flat.new_zeros(len(flat), 1, 0).long()  # (M, K, D), (M, K, l)
        for level, scale in self._stack():
            assert isinstance(level, TableQuantizer)
            table = level.codes * scale
            distance = rest.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * rest @ table.T  # (M, K, C)
            best = distance.flatten(1).topk(min(width, distance.shape[1] * distance.shape[2]), largest=False).indices
            parent, code = best // len(table), best % len(table)
            rest = rest.gather(1, parent.unsqueeze(-1).expand(-1, -1, self.dim)) - table[code]
            ids = torch.cat([ids.gather(1, parent.unsqueeze(-1).expand(-1, -1, ids.shape[2])), code[..., None]], -1)
        return ids[torch.arange(len(flat)), rest.square().sum(-1).argmin(1)]


def _ids_only(level: Quantizer, rest: Tensor) -> Quantized:
    """What a level would answer, without losses, statistics or communication."""
    was_training = level.training
    level.eval()
    with torch.no_grad():
        out = level.quantize(rest, Positions(rest, None, synced=False), None, None)
    level.train(was_training)
    return out


@register("quantizer", "grouped_residual")
class GroupedResidualQuantizer(Quantizer):
    """Channels cut into groups, residual quantisation in each (HiFi-Codec, arXiv 2305.02765).

    Ids (B, N, groups * L * G), group-major. Loss terms are means over groups (each is a mean over its channels) of
    sums over levels. One number of levels is drawn for all groups under `quantize_dropout`.

    Args:
        base: The quantizer of each level; its dim is that of one group.
        layers: Levels in each group.
        groups: Groups; dim = groups * base.dim.
        level_scale: See `residual`.
        quantize_dropout: Train on random numbers of levels.
        dropout_keep: Smallest number of levels kept.
    """

    def __init__(
        self,
        *,
        base: Annotated[Spec, Of("quantizer")],
        layers: int,
        groups: int,
        level_scale: float = 1.0,
        quantize_dropout: bool = False,
        dropout_keep: int = 1,
    ) -> None:
        parts = [
            ResidualQuantizer(
                base=base,
                layers=layers,
                level_scale=level_scale,
                quantize_dropout=quantize_dropout,
                dropout_keep=dropout_keep,
            )
            for _ in range(require_positive("groups", groups))
        ]
        super().__init__(groups * parts[0].dim, parts[0].vocab_sizes * groups)
        self.parts = nn.ModuleList(parts)
        self.weights = dict(parts[0].weights)

    def _groups(self) -> list[ResidualQuantizer]:
        found = []
        for part in self.parts:
            assert isinstance(part, ResidualQuantizer)
            part.weights, part.usage = self.weights, None
            found.append(part)
        return found

    def quantize(
        self,
        z: Tensor,
        positions: Positions,
        grid: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Quantized:
        """See `Quantizer.forward`."""
        groups = self._groups()
        active = groups[0].draw_active(z, generator)
        pieces = z.chunk(len(groups), dim=-1)
        outs = [part.quantize_levels(x, positions, generator, active) for part, x in zip(groups, pieces)]
        ids = torch.cat([part.grouped(out.ids) for part, out in zip(groups, outs) if out.ids is not None], dim=-1)
        losses = sum_terms([out.losses for out in outs], 1 / len(groups))
        return self.result(torch.cat([out.codes for out in outs], dim=-1), self.ungrouped(ids), losses)

    def ids_to_codes(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes of all groups: int64 (B, N, groups * L * G) -> (B, N, D) float32.

        Raises:
            ValueError: Wrong number of ids, or an id outside the vocabulary.
        """
        parts = self._groups()
        pieces = self.grouped(self.check_ids(ids)).chunk(len(parts), dim=-1)
        return torch.cat([part.ids_to_codes(part.ungrouped(x)) for part, x in zip(parts, pieces)], dim=-1)

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Ids of the groups' codes: (B, N, D) -> int64 (B, N, groups * L * G). See `residual`.

        Raises:
            ValueError: Wrong number of channels, or codes whose ids were not found.
        """
        pieces = self.check_codes(codes).chunk(len(self.parts), dim=-1)
        ids = [part.grouped(part.codes_to_ids(x)) for part, x in zip(self._groups(), pieces)]
        return self.ungrouped(torch.cat(ids, dim=-1))
