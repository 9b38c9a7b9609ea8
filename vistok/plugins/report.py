"""What a call cost, with and without the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vistok.compress.budget import HostShape
from vistok.compress.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures of one call; lists hold one entry per sample.

    Attributes:
        method: Name of the method.
        config: Its settings.
        trace: Tokens per layer.
        budget: What was left, as count, ratio, layer average and share of the image tokens' FLOPs.
        flops: FLOPs of the prefill inside the decoder layers (closed form, two per multiply-add).
        flops_without: The same for the uncompressed prompt.
        cache_bytes: Bytes of cached keys and values.
        cache_bytes_without: The same for the uncompressed prompt and as many steps.
    """

    method: str
    config: Mapping[str, Any]
    trace: Trace
    budget: Mapping[str, list[float]]
    flops: list[int]
    flops_without: list[int]
    cache_bytes: list[int]
    cache_bytes_without: list[int]

    def __str__(self) -> str:
        share = sum(self.flops) / max(sum(self.flops_without), 1)
        lines = [
            f"{self.method} {dict(self.config)}",
            str(self.trace),
            f"image tokens left {self.trace.image[-1]} of {[sum(r) for r in self.trace.images]}",
            f"image tokens entering a layer, on average {self.trace.mean}",
            f"prefill FLOPs {sum(self.flops):.3e} of {sum(self.flops_without):.3e} ({share:.1%})",
        ]
        if self.cache_bytes:
            lines.append(f"cache bytes {sum(self.cache_bytes)} of {sum(self.cache_bytes_without)}")
        return "\n".join(lines)


def build_report(name: str, config: Mapping[str, Any], trace: Trace, host: HostShape, element_size: int) -> Report:
    """Work the figures out of a trace.

    Args:
        name: Name of the method.
        config: Its settings.
        trace: Of the call.
        host: Sizes of the language model.
        element_size: Bytes per number in the cache.
    """
    per_token = host.depth * host.cache_elements() * element_size
    return Report(
        method=name,
        config=config,
        trace=trace,
        budget=trace.budget(host),
        flops=trace.flops(host),
        flops_without=trace.flops_without(host),
        cache_bytes=trace.cache_bytes(host, element_size) if trace.cached else [],
        cache_bytes_without=[(n + trace.steps) * per_token for n in trace.prompt],
    )
