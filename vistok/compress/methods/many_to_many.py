"""Many-to-many reduction in a vision tower: every token is shared out among several anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vistok.compress.budget import Budget
from vistok.compress.reduction import Reduction, behind_prefix, take
from vistok.compress.vision import BlockView, StagedVisionMethod
from vistok.registry import register

Anchors = Literal["salient", "received", "key_norm", "uniform"]


@register("method", "many_to_many")
class ManyToMany(StagedVisionMethod):
    """Our construction in the matrix view of Token Transforming (arXiv 2506.05709): Y = W X with soft, sparse W.

    The authors' code was never released: this is not a reproduction. In a few blocks some tokens become anchors, and
    every other token gives its mass (patches it stands for) to its `links` most similar anchors, in the proportions of
    exp(cosine of keys / temperature). Outputs are means weighted by mass, so constants stay constant and mass is
    conserved; sizes are no whole numbers any more, and proportional attention takes their logarithm as it is. The way
    back gives every token the mean of its anchors by the same shares. Training-free, no parameters.

    Defaults: after the attention of blocks 3, 6 and 9 of 12 (from 0), 65 % of the tokens each time, which is 40 % fewer
    FLOPs on DeiT-S at 224 pixels.

    Args:
        keep: Patches left after the last stage (int, share or `Budget`); the stages before follow.
        blocks: Blocks in which it acts, from 0.
        ratios: Share of the patches left after each stage.
        links: Anchors that a token is shared among, at least 1.
        temperature: Of the shares; 0 gives everything to the nearest anchor.
        threshold: Links of a lower cosine are cut, except a token's best.
        anchors: salient (the class token's attention, or attention received where there is none), received,
            key_norm (needs no attention) or uniform (evenly spaced: the baseline that belongs in every comparison).
        proportional: Proportional attention.
        restore: Full length after every block, for dense prediction.
    """

    merges = True
    needs = frozenset({"keys", "cls_row"})
    published_blocks = (3, 6, 9)
    published_ratios = (0.65, 0.4225, 0.2746)

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        blocks: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
        links: int = 2,
        temperature: float = 0.1,
        threshold: float = 0.0,
        anchors: Anchors = "salient",
        proportional: bool = True,
        restore: bool | None = None,
    ) -> None:
        super().__init__(keep=keep, blocks=blocks, ratios=ratios, proportional=proportional, restore=restore)
        if links < 1 or temperature < 0:
            raise ValueError(f"links={links}, temperature={temperature}: at least 1 and at least 0.")
        self.links, self.temperature, self.threshold, self.anchors = links, temperature, threshold, anchors

    def in_block(self, view: BlockView) -> Reduction:
        """Choose anchors and share out."""
        count = self.quota(view)
        index = self._scores(view).sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        shared = share_out(
            view.metric[:, view.prefix :],
            index,
            view.sizes[:, view.prefix :],
            links=1 if self.temperature == 0 else self.links,
            temperature=self.temperature,
            threshold=self.threshold,
        )
        return behind_prefix(shared, view.prefix, view.sizes)

    def _scores(self, view: BlockView) -> Tensor:
        """Score of every token behind the prefix as an anchor."""
        rest = slice(view.prefix, None)
        if self.anchors == "salient":
            return view.salience()[:, rest]
        if self.anchors == "received":
            return view.received()[:, rest]
        if self.anchors == "key_norm":
            length: Tensor = torch.linalg.vector_norm(view.metric[:, rest], dim=-1)
            return length
        n, count = view.count - view.prefix, self.quota(view)
        place = torch.arange(n, device=view.sizes.device)
        chosen = (place * count // n).diff(prepend=place.new_tensor([-1])) > 0  # one in every n / count
        scores: Tensor = chosen.float().expand(len(view.sizes), -1)
        return scores


def share_out(
    metric: Tensor, anchors: Tensor, mass: Tensor, *, links: int, temperature: float, threshold: float = -1.0
) -> Reduction:
    """Give every token's mass to its most similar anchors; anchors keep their own.

    Args:
        metric: What is compared by cosine, (B, N, d).
        anchors: Tokens that stay, ascending, (B, M).
        mass: Of every token, (B, N).
        links: Anchors per token.
        temperature: Of the shares; not used with one link.
        threshold: Links of a lower cosine are cut, except a token's best.
    """
    batch, n, _ = metric.shape
    unit = F.normalize(metric.float(), dim=-1, eps=1e-12)
    table = unit @ take(unit, anchors).transpose(1, 2)  # (B, N, M)
    best = table.topk(min(links, anchors.shape[1]), dim=2)
    logits = best.values if temperature == 0 else best.values / temperature
    cut = best.values < threshold
    cut[..., 0] = False
    shares = logits.masked_fill(cut, -torch.inf).softmax(-1)
    slot = torch.full((batch, n), -1, device=metric.device)
    slot = slot.scatter(1, anchors, torch.arange(anchors.shape[1], device=metric.device).expand(batch, -1))
    own = (slot >= 0).unsqueeze(-1)
    alone = torch.zeros_like(shares)
    alone[..., 0] = 1
    shares = torch.where(own, alone, shares)
    to = torch.where(own, slot.unsqueeze(-1), best.indices)
    given = shares * mass.unsqueeze(-1)
    sizes = torch.zeros(anchors.shape, device=metric.device).scatter_add(1, to.flatten(1), given.flatten(1))
    weights = given / sizes.gather(1, to.flatten(1)).view_as(given)
    return Reduction(anchors, sizes, n, to.masked_fill(shares == 0, -1), weights, drops=False)
