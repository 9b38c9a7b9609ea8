"""GlobalCom2: the overview of a high-resolution picture commands the compression of its crops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vistok.compress.budget import Budget
from vistok.compress.crops import guided_scores, retention_ratios, share_out
from vistok.compress.method import FeatureMethod, first_tokens, selection
from vistok.compress.reduction import Reduction
from vistok.compress.select import best
from vistok.compress.signals import Signals
from vistok.registry import register


@register("method", "globalcom2")
class GlobalCom2(FeatureMethod):
    """Richness of every crop in the overview -> its retention ratio -> its best tokens (arXiv 2501.05179, AAAI 2026).

    Scores are logits of the class token in the last block (of the mean query in towers without one): probabilities
    would make every ratio equal. A crop's tokens are ranked by its own and the overview's scores together. Released
    as selection: what is not kept is discarded, nothing is merged. A picture of one crop keeps its best tokens (the
    released code leaves it alone).

    Args:
        keep: Tokens left: an int per image, a float share, or a `Budget`. 0.25 is the R of the released code; the
            paper also has 0.75, 0.5 and 0.1. Ratios are rescaled so that the budget is met exactly.
        temperature: Of the softmax over crops.
        reference: Ratios and rounding as published (the total then depends on the picture), the overview's tokens by
            score, positions counted anew. Newlines stay where the host has them, and tokens of padded crops where they
            belong; `crops.stitch` gives the released placement.
    """

    needs = frozenset({"cls_row", "crops"})
    blocks = (-1,)
    row = "logit"
    per_crop = True

    def __init__(
        self, *, keep: int | float | Budget = 0.25, temperature: float = 10.0, reference: bool = False
    ) -> None:
        super().__init__(keep=keep, reference=reference)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: it has to be above 0.")
        self.temperature = temperature

    def compress_image(self, parts: Sequence[Signals], count: int | None) -> list[Reduction]:
        """The overview first, then its crops."""
        assert count is not None
        whole, *crops = parts
        if not crops or whole.crop is None:
            return super().compress_image(parts, count)
        assert whole.grid is not None and crops[0].crop is not None
        h, w = whole.grid[0], whole.grid[1]
        ratio = self.keep if isinstance(self.keep, float) else count / sum(part.length for part in parts)
        ratios = retention_ratios(whole.row(), (h, w), crops[0].crop.layout, ratio, self.temperature).tolist()
        mine = [ratios[part.crop.number] for part in crops if part.crop is not None]
        rooms = [part.length for part in crops]
        if self.reference:
            first = int(whole.length * ratio)
            shares = [int(n * r) for n, r in zip(rooms, mine)]
        else:
            first = min(max(round(whole.length * ratio), 1, count - sum(rooms)), count, whole.length)
            shares = share_out(count - first, [n * r for n, r in zip(rooms, mine)], rooms)
        found = [self._overview(whole, first)]
        for part, share in zip(crops, shares):
            assert part.crop is not None and part.grid is not None
            scores = guided_scores(part.row(), whole.row().view(h, w), part.crop, (part.grid[0], part.grid[1]))
            found.append(selection(best(scores, share), part.length) if share else first_tokens(part, 0))
        return found

    def _overview(self, whole: Signals, count: int) -> Reduction:
        chosen = best(whole.row(), count)
        if not self.reference:
            return selection(chosen, whole.length)
        index = chosen.sort().values.unsqueeze(0)  # the places in order, the tokens by score
        links = torch.full((1, whole.length, 1), -1, device=chosen.device)
        links[0, chosen, 0] = torch.arange(count, device=chosen.device)
        return Reduction(index, torch.ones_like(index), whole.length, links, (links >= 0).float())

    def compress(self, signals: Signals, count: int | None) -> Reduction:
        """Of a picture without crops: the best tokens."""
        assert count is not None
        return self._overview(signals, count)
