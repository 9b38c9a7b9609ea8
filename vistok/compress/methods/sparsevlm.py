"""SparseVLM (arXiv 2410.04417): text tokens that look at the picture rate its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vistok.compress.budget import Budget, HostShape
from vistok.compress.cluster import density_peaks
from vistok.compress.method import Decision, ScheduledMethod, attention_received
from vistok.compress.reduction import Reduction, pack
from vistok.compress.score import matrix_rank, mean_over_rows, rotary_gravity, rotary_gravity_product
from vistok.compress.select import top_in_segments
from vistok.compress.view import View
from vistok.registry import preset, register

LISTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
TOKENS = 576  # the released lists are counts out of so many
RECYCLED, GROUP = 0.3, 10  # share of the dropped tokens that is clustered, and members per cluster
HEADS = 14  # heads that SparseVLM+ listens to


def shares(counts: Sequence[int]) -> tuple[float, ...]:
    """Released counts of LLaVA-1.5 as shares of the image."""
    return tuple(count / TOKENS for count in counts)


def rater_weights(image: Tensor, text: Tensor, is_image: Tensor, is_text: Tensor) -> Tensor:
    """How much each text token resembles the picture: mean over image tokens of a softmax over text, (B, L).

    Args:
        image: Embeddings, (B, L, D); where `is_image`.
        text: The same sequence; where `is_text`.
        is_image: (B, L).
        is_text: (B, L).
    """
    logits = (image.float() @ text.float().transpose(1, 2)).masked_fill(~is_text.unsqueeze(1), -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0) * is_image.unsqueeze(-1)
    total: Tensor = weights.sum(1) / is_image.sum(1, keepdim=True).clamp_min(1)
    return total


@register("method", "sparsevlm")
class SparseVLM(ScheduledMethod):
    """Cuts after layers 2, 6, 15 of 32 by the attention of "raters", the text tokens that resemble the picture most.

    Raters are the text tokens after the last image whose mean softmax similarity to the image embeddings is above
    average. Defaults are the released 1.5 list for 192 tokens as shares of 576; that label counts tokens leaving a
    layer, what enters is 206.5. Of what a cut drops, the best 30 % are clustered and the means kept beside the
    survivors (`recycle`): a mean takes the place of its centre, in the released code it goes behind the image.

    Args:
        keep: Image tokens left after the last cut (cluster means not counted): an int per image, a float share, or a
            `Budget`.
        layers: Layers in front of which the cuts fall (released: 3, 7, 16).
        ratios: Share of the original tokens left after each.
        recycle: Keep means of dropped tokens.
        rule: `schedule`, or `rank`: the paper's adaptive rule (first release), int(rank * scale + bias) tokens stay,
            where rank is that of the raters' attention to the image.
        scale: Of the rank rule.
        bias: Of the rank rule.
        reference: As released: renumbered positions, means behind the image, counts clipped to n - 1.
    """

    published_layers = (3, 7, 16)
    published_ratios = shares(LISTS[192])
    merges = True

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        layers: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
        recycle: bool = True,
        rule: Literal["schedule", "rank"] = "schedule",
        scale: float = 13.5,
        bias: float = 0.0,
        reference: bool = False,
    ) -> None:
        super().__init__(keep=keep, layers=layers, ratios=ratios, reference=reference)
        if rule == "rank" and keep is not None:
            raise ValueError("The rank rule decides itself how many tokens stay; give scale and bias instead of keep.")
        self.recycle, self.rule, self.scale, self.bias = recycle, rule, scale, bias

    @property
    def renumber(self) -> bool:
        """The released 1.x code renumbers."""
        return self.reference

    def source_of(self, layer: int) -> int:
        """The layer before the cut."""
        return layer - 1

    def rows(self, view: View) -> Tensor:
        """The raters; all text after the image if none stands out."""
        assert view.hidden is not None
        text = view.text_after_images()
        weights = rater_weights(view.hidden, view.hidden, view.image, text)
        mean = (weights * text).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp_min(1)
        raters = (weights > mean) & text
        return torch.where(raters.any(1, keepdim=True), raters, text)

    def scores(self, view: View) -> Tensor:
        """Attention of the raters, mean over heads and raters."""
        return attention_received(view)

    def reduce(self, view: View, host: HostShape) -> Decision:
        """Keep the best-rated tokens, and means of clusters of the best that go."""
        quotas = self._quotas(view, host)
        if quotas == view.counts:
            return Decision(reduction=None, counts=view.counts)
        scores = self.scores(view)
        if not self.recycle:
            return Decision(reduction=view.keep_top(scores, quotas), counts=quotas)
        return recycle(view, scores, quotas, behind=self.reference)

    def _quotas(self, view: View, host: HostShape) -> list[list[int]]:
        if self.rule == "rank":
            ranks = self._ranks(view)
            wanted = [[int(rank * self.scale + self.bias) for rank in row] for row in ranks]
            return [
                [now if r >= now else min(w, now - 1) for w, r, now in zip(*rows)]
                for rows in zip(wanted, ranks, view.counts)
            ]
        wanted = [[self.quota(n, host)[view.stage] for n in row] for row in view.sizes]
        most = 1 if self.reference and self.keep is None else 0  # the released code always drops at least one
        return [[min(w, now - most) for w, now in zip(*rows)] for rows in zip(wanted, view.counts)]

    def _ranks(self, view: View) -> list[list[int]]:
        """Rank of the raters' attention to each image; one synchronisation."""
        assert view.attention is not None and view.row_valid is not None
        mean = view.attention.mean(1) * view.row_valid.unsqueeze(-1)  # (B, R, L)
        found = [matrix_rank(mean * (view.segment == s).unsqueeze(1)) for s in range(view.images)]
        return [row[: len(now)] for row, now in zip(torch.stack(found, 1).tolist(), view.counts)]


def recycle(view: View, scores: Tensor, quotas: list[list[int]], *, behind: bool) -> Decision:
    """Keep the best tokens of every image and means of clusters of the best of the rest.

    Args:
        view: The columns.
        scores: (B, L).
        quotas: Tokens to keep per image.
        behind: Put the means behind the image's tokens instead of at their centres.
    """
    assert view.hidden is not None
    ranked = scores.double().masked_fill(view.protect, torch.inf)
    keep = top_in_segments(ranked, view.segment, quotas)
    going = view.image & ~keep
    gone = [[now - q for now, q in zip(*rows)] for rows in zip(view.counts, quotas)]
    members = [[int(g * RECYCLED) + 1 if g else 0 for g in row] for row in gone]
    groups = [[m // GROUP + 1 if m else 0 for m in row] for row in members]
    rest = torch.where(going, view.segment, -1)
    member = top_in_segments(ranked, rest, members)
    n = view.index.shape[1]
    links = torch.where(keep | (view.valid & ~view.image), torch.arange(n, device=keep.device), -1)
    weights = torch.ones_like(links, dtype=torch.float32)
    key = torch.arange(n, device=keep.device, dtype=torch.float64).expand_as(links).clone()
    centre_mask = torch.zeros_like(keep)
    for s in range(view.images):
        wanted = [row[s] if s < len(row) else 0 for row in groups]
        clusters = torch.tensor(wanted, device=keep.device)
        mine = member & (view.segment == s)
        label, centres = density_peaks(view.hidden, mine, clusters, max(wanted))
        anchor = centres.gather(1, label.clamp_min(0))
        links = torch.where(mine, anchor, links)
        size = (
            torch.zeros_like(weights).scatter_add(1, anchor.clamp_min(0), mine.float()).gather(1, anchor.clamp_min(0))
        )
        weights = torch.where(mine, 1 / (size + 1e-6), weights)
        is_centre = torch.zeros(len(keep), n + 1, dtype=torch.bool, device=keep.device)
        is_centre = is_centre.scatter(1, torch.where(centres >= 0, centres, n), True)[:, :n]
        centre_mask |= is_centre
        if behind:
            last = torch.where(view.segment == s, key, -1.0).amax(1, keepdim=True)
            key = torch.where(is_centre, last + (label + 1) / (n + 2), key)
    counts = [[q + g for q, g in zip(*rows)] for rows in zip(quotas, groups)]
    stay = keep | centre_mask | (view.valid & ~view.image)
    picked = pack(stay, max(t + sum(row) for t, row in zip(view.texts, counts)), key)
    return Decision(reduction=with_links(picked, links, weights, stay), counts=counts)


def with_links(picked: Reduction, links: Tensor, weights: Tensor, stay: Tensor) -> Reduction:
    """A selection of anchors, to which other tokens contribute.

    Args:
        picked: The anchors.
        links: Anchor column that each column contributes to, -1 for none, (B, N).
        weights: Weight of the contribution, (B, N).
        stay: The anchors as a mask, (B, N).
    """
    slot = picked.labels()  # output of every anchor
    target = torch.where(links >= 0, slot.gather(1, links.clamp_min(0)), -1)
    sizes = torch.zeros_like(picked.sizes).scatter_add(1, target.clamp_min(0), (target >= 0).to(picked.sizes.dtype))
    return Reduction(picked.index, sizes * picked.valid, picked.length, target.unsqueeze(-1), weights.unsqueeze(-1))


@register("method", "sparsevlm_plus")
class SparseVLMPlus(SparseVLM):
    """SparseVLM 2.0: the raters' attention freed of its bias towards near tokens, from the heads that look most.

    Every probability is divided by the weight that rotary positions alone give to its distance ("gravity
    correction"); the 14 heads with the largest sum over raters and image are averaged (half of the heads where a model
    has fewer than 28). Nothing is recycled and positions stay, as released. Beyond distances LLaVA-1.5 never reaches
    the divisor is kept above 10 % of its largest value.

    Args:
        keep: Image tokens left after the last cut: an int per image, a float share, or a `Budget`.
        layers: Layers in front of which the cuts fall (released: 3, 7, 16).
        ratios: Share of the original tokens left after each; by default the released list for 192 tokens.
        heads: Heads that are heard.
        gravity: Correct for distance.
        reference: One budget over all images of a sample, 14 heads whatever the model, a divisor that may vanish.
    """

    published_ratios = shares(PLUS[192])
    merges = False

    def __init__(
        self,
        *,
        keep: int | float | Budget | None = None,
        layers: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
        heads: int | None = None,
        gravity: bool = True,
        reference: bool = False,
    ) -> None:
        super().__init__(keep=keep, layers=layers, ratios=ratios, recycle=False, reference=reference)
        self.heads, self.gravity = heads, gravity

    @property
    def renumber(self) -> bool:
        """2.0 keeps the positions."""
        return False

    def scores(self, view: View) -> Tensor:
        """Corrected attention of the best heads, mean over heads and raters."""
        assert view.attention is not None and view.row_valid is not None and view.row_index is not None
        attention = view.attention * view.row_valid[:, None, :, None]
        if self.gravity and view.angles is not None and view.positions is not None:
            positions = view.positions.expand(len(view.index), -1)
            rows = positions.gather(1, view.row_index)
            if self.reference:
                weight = rotary_gravity_product(view.angles, rows, positions)
            else:
                weight = rotary_gravity(view.angles, rows.unsqueeze(-1) - positions.unsqueeze(1))
            attention = attention / weight.unsqueeze(1)
        total = attention.shape[1]
        wanted = self.heads or (HEADS if self.reference or total >= 2 * HEADS else max(1, total // 2))
        best = (attention * view.image[:, None, None]).sum((2, 3)).topk(min(wanted, total), dim=1).indices
        heard = attention.gather(1, best[:, :, None, None].expand(-1, -1, *attention.shape[2:])).mean(1)
        return mean_over_rows(heard, view.row_valid)


for _label, _counts in LISTS.items():
    preset("method", f"sparsevlm_{_label}", builder="sparsevlm", config={"ratios": list(shares(_counts))})
for _label, _counts in PLUS.items():
    preset("method", f"sparsevlm_plus_{_label}", builder="sparsevlm_plus", config={"ratios": list(shares(_counts))})
