"""Frechet distances: streaming statistics of features, reference files, the distance itself.

No scipy: the trace of the matrix square root comes from singular values where one side has few pictures and from two
symmetric eigenproblems otherwise, which is faster and does not produce complex numbers.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vistok.evaluate.metric import add_up


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
        mean: float64, (D,).
        covariance: float64, (D, D), divided by n - 1.
        n: Number of pictures, None where a reference file does not say.
        factor: F with F^T F = covariance and fewer rows than columns, (n, D); None where there is none.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None = None
    factor: Tensor | None = None


class FeatureStatistics:
    """Running mean and covariance of features in float64; the features themselves only while they are few.

    Args:
        dim: Feature width D.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(self.dim, dtype=torch.float64)
        self.outer = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        self.few: list[Tensor] | None = []

    def update(self, features: Tensor) -> None:
        """Enter a batch of features, (B, D).

        Raises:
            ValueError: Another width, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"Expected features (B, {self.dim}), got {tuple(features.shape)}.")
        features = features.detach().cpu().double()
        if not torch.isfinite(features).all():
            raise ValueError("Features hold NaN or infinity: one picture would spoil the whole distance.")
        self.count += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)
        if self.few is not None:
            self.few = [*self.few, features] if int(self.count) < self.dim else None

    def gather(self) -> None:
        """Add up the state of all processes. Call it once, on every process."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for tensor in (self.count, self.total, self.outer):
            add_up(tensor)
        everyone: list[list[Tensor] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.few)
        few = [part for parts in everyone if parts is not None for part in parts]
        complete = all(parts is not None for parts in everyone) and int(self.count) < self.dim
        self.few = few if complete else None

    def moments(self) -> Moments:
        """Mean and covariance of everything seen.

        Raises:
            ValueError: Fewer than two pictures.
        """
        n = int(self.count)
        if n < 2:
            raise ValueError(f"A covariance needs at least two pictures, got {n}.")
        mean = self.total / n
        covariance = (self.outer - n * torch.outer(mean, mean)) / (n - 1)
        factor = (torch.cat(self.few) - mean) / (n - 1) ** 0.5 if self.few is not None else None
        return Moments(mean=mean, covariance=covariance, n=n, factor=factor)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Frechet distance of two Gaussians, |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al., eq. 6).

    Raises:
        ValueError: Features of different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"Statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared: they come from different "
            f"networks or layers."
        )
    means = (a.mean - b.mean).square().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return max(float(means + traces - 2.0 * _trace_of_root(a, b)), 0.0)


def _trace_of_root(a: Moments, b: Moments) -> Tensor:
    """Trace of (A B)^(1/2): the sum of the singular values of F_a F_b^T for any factors F^T F."""
    if a.factor is not None and b.factor is not None:
        return torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    if b.factor is not None:
        a, b = b, a
    factor = _factor(a.covariance) if a.factor is None else a.factor
    middle = factor @ b.covariance @ factor.T  # its eigenvalues are the squared singular values
    return torch.linalg.eigvalsh(0.5 * (middle + middle.T)).clamp_min(0.0).sqrt().sum()


def _factor(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp_min(0.0).sqrt()[:, None] * vectors.T


def save_statistics(path: str | Path | BinaryIO, moments: Moments, *, feature: str) -> None:
    """Write `mu`, `sigma`, `n` and the feature's name as .npz, readable by pytorch-fid and by `read_statistics`.

    The factor of few pictures goes along, so that distances are the same to the last bit.
    """
    n = -1 if moments.n is None else moments.n
    extra = {} if moments.factor is None else {"factor": moments.factor.numpy()}
    np.savez(path, mu=moments.mean.numpy(), sigma=moments.covariance.numpy(), n=n, feature=feature, **extra)


def read_statistics(path: str | Path | BinaryIO) -> Moments:
    """Read a reference file: ours, pytorch-fid's, or ADM's reference batches (arrays `mu` and `sigma`).

    Raises:
        ValueError: No such file, not an .npz, or without these two arrays.
    """
    try:
        if isinstance(path, (str, Path)):
            open(path, "rb").close()  # says what is wrong with it
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is not an archive of arrays")
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise ValueError(
                    f"{path} holds {', '.join(file.files)} but no 'mu' and 'sigma'. Files with pictures alone have to "
                    f"be turned into statistics first."
                )
            n = int(file["n"]) if "n" in file.files else -1
            factor = torch.from_numpy(file["factor"]) if "factor" in file.files else None
            mean, covariance = (torch.from_numpy(np.asarray(file[k], dtype=np.float64)) for k in ("mu", "sigma"))
    except (OSError, zipfile.BadZipFile, EOFError) as err:
        raise ValueError(f"{path} cannot be read as an .npz of reference statistics: {err}") from err
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; expected (D,), (D, D)."
        )
    return Moments(mean=mean, covariance=covariance, n=n if n > 0 else None, factor=factor)
