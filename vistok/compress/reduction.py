"""`Reduction`: how N tokens became M, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDE = 8
"""Contributions per input beyond which a map is applied as a matrix: copies of the input cost more."""


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by position: x (B, N, ...), index (B, M) -> (B, M, ...)."""
    if x.ndim == 2:
        return x.gather(1, index)
    if x.shape[0] != index.shape[0]:  # rotary tables come with a batch dimension of one
        x = x.expand(index.shape[0], *x.shape[1:])
    shaped = index.view(*index.shape, *([1] * (x.ndim - 2)))
    return x.gather(1, shaped.expand(*index.shape, *x.shape[2:]))


@dataclass(frozen=True, eq=False)
class Reduction:
    """A map from N input tokens to M output tokens.

    Without `links` it is a selection: output m is a copy of input `index[m]`. With `links`, output m is the weighted
    sum of the inputs that link to it, and `index[m]` is its anchor, whose position in the prompt it takes over.

    Attributes:
        index: Input position of every output (its anchor), int64, (B, M).
        sizes: Input tokens that each output stands for, (B, M); 0 marks a filler, which is not a token.
        length: Number of input tokens, N.
        links: Output that each input contributes to, int64, (B, N, k); -1 for none. None for a selection.
        weights: Weight of each contribution, (B, N, k).
        moved: Inputs that are nobody's anchor, (B, N - M), where every other input is one and k = 1; a short cut.
        ragged: Some outputs may be fillers.
        drops: Some inputs may go nowhere.
    """

    index: Tensor
    sizes: Tensor
    length: int
    links: Tensor | None = None
    weights: Tensor | None = None
    moved: Tensor | None = None
    ragged: bool = False
    drops: bool = True

    @property
    def valid(self) -> Tensor:
        """True at outputs that are tokens, False at fillers, (B, M)."""
        return self.sizes > 0

    def apply(self, x: Tensor) -> Tensor:
        """Reduce x, (B, N, D) -> (B, M, D)."""
        if self.links is None:
            return take(x, self.index)
        assert self.weights is not None
        if self.moved is not None:
            return self._apply_moved(x, self.moved)
        if self.links.shape[2] > WIDE:
            return (self.dense() @ x.float()).to(x.dtype)
        batch = self.links.shape[0]
        slots = self.index.shape[1]
        source = (x.unsqueeze(2) * self.weights.unsqueeze(-1).to(x.dtype)).reshape(batch, -1, x.shape[-1])
        target = self.links.masked_fill(self.links < 0, slots).reshape(batch, -1)  # one slot more for what is dropped
        out = x.new_zeros(batch, slots + 1, x.shape[-1])
        out = out.scatter_add(1, target.unsqueeze(-1).expand_as(source), source)
        return out[:, :slots]

    def _apply_moved(self, x: Tensor, moved: Tensor) -> Tensor:
        """Anchors by a gather, and only what moved by adding."""
        assert self.links is not None and self.weights is not None
        weights = self.weights.to(x.dtype)
        batch, slots = self.index.shape
        out = take(x, self.index) * take(weights, self.index)
        row = torch.arange(batch, device=x.device).unsqueeze(1) * slots
        target = (take(self.links, moved).squeeze(2) + row).flatten()
        added = (take(x, moved) * take(weights, moved)).flatten(0, 1)
        return out.flatten(0, 1).index_add(0, target, added).view_as(out)

    def labels(self) -> Tensor:
        """Output that each input went to (the heaviest link), -1 where it was dropped, (B, N)."""
        if self.links is not None:
            assert self.weights is not None
            best = self.weights.masked_fill(self.links < 0, -1).argmax(-1, keepdim=True)
            return self.links.gather(2, best).squeeze(2)
        batch, slots = self.index.shape
        out = self.index.new_full((batch, self.length + 1), -1)
        target = self.index.masked_fill(~self.valid, self.length)
        out = out.scatter(1, target, torch.arange(slots, device=self.index.device).expand(batch, -1))
        return out[:, : self.length]

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every input its output back, (B, M, D) -> (B, N, D); zeros where the input was dropped.

        An input that feeds several outputs gets their mean, weighted by its shares.
        """
        if self.links is None or self.links.shape[2] == 1:
            labels = self.labels()
            return take(y, labels.clamp_min(0)) * (labels >= 0).unsqueeze(-1).to(y.dtype)
        batch, n, k = self.links.shape
        found = take(y, self.links.clamp_min(0).flatten(1)).view(batch, n, k, -1)
        return (found * self.shares().unsqueeze(-1).to(y.dtype)).sum(2)

    def shares(self) -> Tensor:
        """Share of each input's mass that goes to each of its links, (B, N, k); 1 in all, 0 where it was dropped.

        Weights are mass over size of the output, so the shares are weights times sizes, normalised.
        """
        links, weights = self.as_links()
        sizes = take(self.sizes.float(), links.clamp_min(0).flatten(1)).view(links.shape)
        mass = weights * sizes * (links >= 0)
        total = mass.sum(2, keepdim=True)
        found: Tensor = mass / total.masked_fill(total == 0, 1)
        return found

    def dense(self) -> Tensor:
        """The map as a matrix, (B, M, N) float32: `dense() @ x` equals `apply(x)`; filler rows are zero."""
        batch, slots = self.index.shape
        out = torch.zeros(batch, slots + 1, self.length, device=self.index.device)
        if self.links is None:
            return out[:, :slots].scatter(2, self.index.unsqueeze(-1), self.valid.float().unsqueeze(-1))
        assert self.weights is not None
        target = self.links.masked_fill(self.links < 0, slots)  # (B, N, k)
        for j in range(target.shape[2]):
            out.scatter_add_(1, target[:, None, :, j], self.weights[:, None, :, j].float())
        return out[:, :slots]

    def compose(self, then: Reduction) -> Reduction:
        """This reduction followed by another one.

        Raises:
            ValueError: The second one expects another number of tokens than this one gives.
        """
        if then.length != self.index.shape[1]:
            raise ValueError(
                f"The second reduction maps {then.length} tokens and the first gives {self.index.shape[1]}. "
                "Compose them in the order they ran in."
            )
        index = self.index.gather(1, then.index)
        if self.links is None and then.links is None:
            return Reduction(index, then.sizes, self.length)
        first_links, first_weights = self.as_links()
        then_links, then_weights = then.as_links()
        batch, n, k = first_links.shape
        via = first_links.clamp_min(0).reshape(batch, -1)  # (B, N * k)
        links = take(then_links, via).view(batch, n, -1)
        weights = take(then_weights, via).view(batch, n, k, -1) * first_weights.unsqueeze(-1)
        dead = (first_links < 0).unsqueeze(-1).expand_as(weights).reshape(batch, n, -1)
        links = links.masked_fill(dead, -1)
        mass = self.sizes.float().unsqueeze(-1) * then.shares()  # (B, M, k)
        sizes = torch.zeros_like(then.sizes, dtype=torch.float32)
        sizes = sizes.scatter_add(1, then_links.clamp_min(0).flatten(1), mass.flatten(1))
        return Reduction(
            index,
            sizes.to(then.sizes.dtype),
            self.length,
            links,
            weights.reshape(batch, n, -1),
            ragged=then.ragged,
            drops=self.drops or then.drops,
        )

    def as_links(self) -> tuple[Tensor, Tensor]:
        """Links and weights, also of a selection, (B, N, k) each."""
        if self.links is not None:
            assert self.weights is not None
            return self.links, self.weights
        links = self.labels().unsqueeze(-1)
        return links, (links >= 0).float()


def from_dense(index: Tensor, matrix: Tensor) -> Reduction:
    """The reduction with given anchors (M,) whose map is a matrix, (M, N)."""
    slots, n = matrix.shape
    target, source = torch.where(matrix.T != 0)[::-1]  # by input, then by output
    per_input = torch.bincount(source, minlength=n)
    width = int(per_input.max()) if len(source) else 1
    column = torch.arange(len(source), device=matrix.device) - (per_input.cumsum(0) - per_input)[source]
    links = torch.full((n, width), -1, device=matrix.device).index_put((source, column), target)
    weights = torch.zeros(n, width, device=matrix.device).index_put((source, column), matrix[target, source].float())
    heaviest = links.gather(1, weights.masked_fill(links < 0, -1).argmax(1, keepdim=True))[:, 0]
    sizes = torch.bincount(heaviest[heaviest >= 0], minlength=slots).clamp_min(1)
    return Reduction(index[None], sizes[None], n, links[None], weights[None])


def pack(keep: Tensor, count: int, key: Tensor | None = None) -> Reduction:
    """The selection that moves the kept tokens of every row to the right end, in ascending order.

    Rows that keep fewer than `count` tokens get fillers on the left, so that the last column is the last kept token of
    every row (decoding appends on the right).

    Args:
        keep: True at tokens to keep, (B, N).
        count: M, at least the largest number of kept tokens in a row.
        key: Sort key of the kept tokens, (B, N); by default their position.
    """
    if key is not None:
        order = torch.sort(key, dim=1, stable=True).indices
        index = order.gather(1, torch.sort(keep.gather(1, order).byte(), dim=1, stable=True).indices[:, -count:])
    else:
        index = torch.sort(keep.byte(), dim=1, stable=True).indices[:, -count:]
    return Reduction(index, keep.gather(1, index).long(), keep.shape[1])


def behind_prefix(rest: Reduction, prefix: int, sizes: Tensor) -> Reduction:
    """A reduction of the tokens behind a prefix as one of all tokens.

    Args:
        rest: Of the tokens behind the prefix.
        prefix: Leading tokens, which stay.
        sizes: Of all tokens, (B, N).
    """
    if prefix == 0:
        return rest
    batch = len(sizes)
    lead = torch.arange(prefix, device=sizes.device).expand(batch, -1)
    index = torch.cat([lead, rest.index + prefix], dim=1)
    new_sizes = torch.cat([sizes[:, :prefix].to(rest.sizes.dtype), rest.sizes], dim=1)
    if rest.links is None:
        return Reduction(index, new_sizes, rest.length + prefix, ragged=rest.ragged)
    assert rest.weights is not None
    own = torch.full((batch, prefix, rest.links.shape[2]), -1, device=sizes.device)
    own[..., 0] = lead
    links = torch.cat([own, torch.where(rest.links >= 0, rest.links + prefix, -1)], dim=1)
    weights = torch.cat([(own >= 0).to(rest.weights.dtype), rest.weights], dim=1)
    return Reduction(index, new_sizes, rest.length + prefix, links, weights, ragged=rest.ragged, drops=rest.drops)
