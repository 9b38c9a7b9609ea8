"""`Trace`: how many tokens each layer saw and cached; costs in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vistok.compress.budget import HostShape


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Tokens of one call, counted from what really ran. Padding and fillers are never counted.

    Attributes:
        entered: Tokens entering each layer at prefill, [layer][sample].
        image: Image tokens among them, [layer][sample].
        cached: Tokens in the cache of each layer after the last step, [layer][sample]; empty without a cache.
        filler: Cache slots that hold no token (padding), [layer][sample]: `cached + filler` is the cache's length.
        steps: Tokens fed after the prefill.
        prompt: Tokens of the prompt as the caller gave it, per sample.
        images: Tokens of every image as the tower gave them, [sample][image].
        kept: Columns of the caller's prompt that hold image tokens after the last cut, one tensor per sample.
    """

    entered: list[list[int]]
    image: list[list[int]]
    cached: list[list[int]]
    filler: list[list[int]]
    steps: int
    prompt: list[int]
    images: list[list[int]]
    kept: list[Tensor]

    @property
    def mean(self) -> list[float]:
        """Image tokens entering a layer, averaged over the layers, per sample."""
        return [sum(column) / len(column) for column in zip(*self.image)]

    def flops(self, host: HostShape) -> list[int]:
        """FLOPs of the prefill in the language model's layers, per sample."""
        return [sum(host.layer_flops(n) for n in column) for column in zip(*self.entered)]

    def flops_without(self, host: HostShape) -> list[int]:
        """FLOPs that the uncompressed prompt would have cost, per sample."""
        return [host.depth * host.layer_flops(n) for n in self.prompt]

    def budget(self, host: HostShape) -> dict[str, list[float]]:
        """What the call came to in the four units of a `Budget`, per sample.

        `count` and `ratio` are over all images of the sample, `flops` over its image tokens alone.
        """
        whole = [sum(row) for row in self.images]
        last = self.image[-1] if self.image else []
        spent = [sum(host.layer_flops(n) for n in column) for column in zip(*self.image)]
        return {
            "count": [float(n) for n in last],
            "ratio": [n / max(w, 1) for n, w in zip(last, whole)],
            "mean": self.mean,
            "flops": [s / max(host.depth * host.layer_flops(w), 1) for s, w in zip(spent, whole)],
        }

    def cache_bytes(self, host: HostShape, element_size: int) -> list[int]:
        """Bytes that the tokens of each sample hold in the cache."""
        return [sum(column) * host.cache_elements() * element_size for column in zip(*self.cached)]

    def __str__(self) -> str:
        lines = ["layer  entered  image  cached  (per sample)"]
        for layer, entered in enumerate(self.entered):
            cached = self.cached[layer] if self.cached else "-"
            lines.append(f"{layer:5d}  {entered}  {self.image[layer]}  {cached}")
        return "\n".join(lines)
