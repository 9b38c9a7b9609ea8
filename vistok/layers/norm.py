"""Normalisation layers that torch does not have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.distributed import differentiable_sum, world_size


class AllReduceBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the joint batch of all processes, on any device.

    Arguments and state dict are those of `nn.BatchNorm2d`, and so is the result where one process runs. On several,
    P processes with their shares of a batch, however unequal (also empty), give what one gives on the whole batch:
    outputs, running statistics, and the gradients of the sum of their losses, higher ones included
    (`nn.SyncBatchNorm` does this on GPUs only, without second derivatives).

    Mean and variance are two messages, of C + 1 and of C numbers, so that the variance does not suffer from
    cancellation. Statistics are float32 whatever the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map (B, C, h, w).

        Raises:
            ValueError: Not four-dimensional; on one process also a single value per channel in training.
        """
        if world_size() == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, C, h, w)
        sums = torch.cat([wide.sum((0, 2, 3)), wide.new_full((1,), x.numel() // self.num_features)])
        total = differentiable_sum(sums)  # (C + 1,)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean[:, None, None]
        variance = differentiable_sum(centred.square().sum((0, 2, 3))) / count
        if self.training:
            self._track(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        out = centred * (variance + self.eps).rsqrt()[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class LocalBatchNorm1d(nn.Module):
    """Batch norm of StyleGAN-T's discriminator: over groups of a few samples, no running statistics.

    From the official code of arXiv 2301.09515 (the paper names it "batch norm with small virtual batches"). A batch is
    cut into ceil(B / group) consecutive groups. There B must divide evenly; here sizes may differ by one. Statistics
    stay on the process that has the samples, so several processes do not equal one. The same in training and
    evaluation.

    Args:
        channels: C.
        group: Samples per group, at most.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, *, group: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.group, self.eps = group, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, N) over samples of a group and positions; float32 inside."""
        groups = x.float().tensor_split(max(1, -(-len(x) // self.group)))
        # running statistics are absent, so `training=True` means: use those of the batch
        normed = [F.batch_norm(g, None, None, self.weight, self.bias, training=True, eps=self.eps) for g in groups]
        return torch.cat(normed).to(x.dtype)
