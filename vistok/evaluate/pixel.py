"""PSNR, SSIM, MS-SSIM and mean absolute error, each with exactly one definition.

Published tables differ by definition as much as by model: SSIM of one pair is 0.848, 0.852, 0.862 or 0.871 depending
on window, border and colour. Here: RGB, Gaussian window of 11 pixels and sigma 1.5, positions where the window fits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.evaluate.metric import Metric
from vistok.registry import register

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03
LARGEST_PSNR = 100.0
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, table of section 3.2


@register("metric", "psnr")
class Psnr(Metric):
    """Peak signal-to-noise ratio: mean over pictures of each picture's own, in dB; equal pictures count as 100 dB.

    Args:
        rounding: Round to the 256 values a saved picture has before measuring.
    """

    title = "PSNR"
    unit = "dB"
    higher_is_better = True
    span = (0.0, LARGEST_PSNR)
    decimals = 2
    definition = "mean of the per-picture PSNR on RGB, peak 1, equal pictures count as 100 dB"

    def measure(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """See `Metric.measure`."""
        error = (reconstruction.double() - target.double()).square().flatten(1).mean(1)
        return (-10.0 * torch.log10(error.clamp_min(1e-30))).clamp(max=LARGEST_PSNR)


@register("metric", "l1")
class MeanAbsoluteDifference(Metric):
    """Mean absolute difference of pictures in [0, 1].

    Args:
        rounding: Round to the 256 values a saved picture has before measuring.
    """

    title = "L1"
    higher_is_better = False
    span = (0.0, 1.0)
    definition = "mean absolute difference of RGB in [0, 1]"

    def measure(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """See `Metric.measure`."""
        return (reconstruction.double() - target.double()).abs().flatten(1).mean(1)


@register("metric", "ssim")
class Ssim(Metric):
    """Structural similarity (Wang et al. 2004), as scikit-image with `gaussian_weights`, and as piq.

    Args:
        rounding: Round to the 256 values a saved picture has before measuring.
    """

    title = "SSIM"
    higher_is_better = True
    span = (-1.0, 1.0)
    least = WINDOW
    definition = "RGB, Gaussian window 11, sigma 1.5, population covariance, window inside the picture, channel mean"

    def measure(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """See `Metric.measure`."""
        similarity, _ = ssim_terms(reconstruction, target)
        return similarity.mean(1)


@register("metric", "ms_ssim")
class MultiScaleSsim(Metric):
    """Multi-scale SSIM (Wang et al. 2003): five scales by 2 x 2 means, published exponents.

    Args:
        rounding: Round to the 256 values a saved picture has before measuring.
    """

    title = "MS-SSIM"
    higher_is_better = True
    span = (0.0, 1.0)
    least = (WINDOW - 1) * 2 ** (len(MS_SSIM_WEIGHTS) - 1) + 1  # the window must fit at the coarsest scale
    definition = "SSIM as defined here at 5 scales (2x2 means), exponents .0448 .2856 .3001 .2363 .1333, negative = 0"

    def measure(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """See `Metric.measure`."""
        product = reconstruction.new_ones(())
        x, y = reconstruction, target
        for scale, weight in enumerate(MS_SSIM_WEIGHTS):
            if scale:
                x, y = (F.avg_pool2d(v, 2, padding=[s % 2 for s in v.shape[2:]]) for v in (x, y))
            similarity, contrast = ssim_terms(x, y)
            last = scale == len(MS_SSIM_WEIGHTS) - 1
            product = product * (similarity if last else contrast).clamp_min(0.0) ** weight
        return product.mean(1)


def ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure factor, averaged over positions.

    Args:
        x: Pictures in [0, 1], (B, C, H, W).
        y: Pictures of the same shape.

    Returns:
        Both (B, C), in float32.
    """
    moments = _blur(torch.stack((x, y, x * x, y * y, x * y)))
    mean_x, mean_y = moments[0], moments[1]
    square_x, square_y, product = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    var_x, var_y, covariance = moments[2] - square_x, moments[3] - square_y, moments[4] - product
    contrast = (2.0 * covariance + K2**2) / (var_x + var_y + K2**2)
    luminance = (2.0 * product + K1**2) / (square_x + square_y + K1**2)
    return (luminance * contrast).mean((2, 3)), contrast.mean((2, 3))


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean where the window fits, (..., H, W) -> (..., H - 10, W - 10).

    Shifted sums instead of a convolution: no TF32, one order of additions whatever the batch.
    """
    half = [math.exp(-0.5 * (i / SIGMA) ** 2) for i in range(-(WINDOW // 2), WINDOW // 2 + 1)]
    taps = [t / sum(half) for t in half]
    for axis in (-2, -1):
        length = x.shape[axis] - WINDOW + 1
        blurred = taps[0] * x.narrow(axis, 0, length)
        for i, tap in enumerate(taps[1:], start=1):
            blurred.add_(x.narrow(axis, i, length), alpha=tap)
        x = blurred
    return x
