"""Statistics of original pictures, kept between evaluations under a hash of everything they depend on.

The Inception network sees a validation set once: the next tokenizer is compared with the statistics that were kept. The
key covers every file's name and content, the preprocessing, the network, its weights, how it is fed, and the versions
of what reads and computes; a file that was cut off or altered is not used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vistok.config import plain
from vistok.distributed import all_objects, of_first, rank
from vistok.evaluate import protocol
from vistok.evaluate.distribution import FrechetMetric
from vistok.evaluate.fid import Moments, read_statistics, save_statistics
from vistok.evaluate.metric import Metric
from vistok.hub import write_atomic
from vistok.image import Preprocess, find_pictures, read_batches

FORMAT = 1
VERSIONS = ("torch", "pillow", "numpy")


def folder() -> Path:
    """Where statistics are kept: `VISTOK_CACHE`/statistics, by default ~/.cache/vistok/statistics."""
    return Path(os.environ.get("VISTOK_CACHE", "~/.cache/vistok")).expanduser() / "statistics"


def key_of(metric: FrechetMetric, data_sha256: str, preprocess: Preprocess) -> str:
    """SHA-256, in hex, over everything that the statistics of a set of pictures depend on.

    Args:
        metric: Whose features.
        data_sha256: Hash of the files, see `protocol.data_facts`.
        preprocess: How they are resized and cropped.
    """
    installed = protocol.versions()
    facts = {
        "format": FORMAT,
        "data": data_sha256,
        "preprocess": plain(preprocess),
        "metric": metric.feature_facts(),
        "versions": {name: installed.get(name) for name in VERSIONS},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def keep(key: str, moments: Moments, where: Path | None = None) -> Path:
    """Write statistics: a line with key and checksum, then an .npz. Returns the file."""
    where = where or folder()
    where.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    save_statistics(data, moments, feature=key)
    head = json.dumps({"key": key, "sha256": hashlib.sha256(data.getvalue()).hexdigest()}).encode()
    path = where / f"{key[:32]}.stats"
    write_atomic(path, head + b"\n" + data.getvalue())
    return path


def kept(key: str, where: Path | None = None) -> Moments | None:
    """Statistics that were kept under a key; None if there are none, or if their file is not as it was written."""
    path = (where or folder()) / f"{key[:32]}.stats"
    try:
        head, _, data = path.read_bytes().partition(b"\n")
        said = json.loads(head)
        if said != {"key": key, "sha256": hashlib.sha256(data).hexdigest()}:
            return None
        return read_statistics(io.BytesIO(data))
    except (OSError, ValueError):
        return None


def recall(
    metrics: Mapping[str, Metric], pictures: Sequence[Path], preprocess: Preprocess, root: Path
) -> dict[str, str]:
    """Give every Frechet metric the statistics of the originals, where they were kept.

    Every process has to call it; the first one reads.

    Args:
        metrics: By name; those with a reference of their own are left alone.
        pictures: The originals.
        preprocess: How they are resized and cropped.
        root: Folder their names are relative to.

    Returns:
        Name of each such metric -> key of the statistics.
    """
    wanted = {n: m for n, m in metrics.items() if isinstance(m, FrechetMetric) and m.reference is None}
    if not wanted or not pictures:
        return {}
    found: dict[str, tuple[str, Moments | None]] = {}
    if rank() == 0:
        data = protocol.data_facts("", pictures, root=root)["sha256"]
        keys = {name: key_of(metric, data, preprocess) for name, metric in wanted.items()}
        found = {name: (key, kept(key)) for name, key in keys.items()}
    found = all_objects(found)[0]
    for name, (_, moments) in found.items():
        wanted[name].originals = moments
    return {name: key for name, (key, _) in found.items()}


def remember(metrics: Mapping[str, Metric], keys: Mapping[str, str]) -> None:
    """Keep the statistics that an evaluation computed; call it after the metrics were gathered."""
    for name, key in keys.items():
        metric = metrics[name]
        assert isinstance(metric, FrechetMetric)
        if rank() == 0 and metric.originals is None and int(metric.real.count) >= 2:
            keep(key, metric.real.moments())


def of_folder(metric: FrechetMetric, source: Path, preprocess: Preprocess, device: torch.device) -> Moments:
    """Statistics of the pictures of a folder: kept ones, or computed and kept.

    Raises:
        FileNotFoundError: No pictures there.
        ValueError: Fewer than two that can be read.
    """
    files = find_pictures(source)
    key = key_of(metric, protocol.data_facts("", files, root=source)["sha256"], preprocess)
    found = kept(key)
    if found is None:
        seen = type(metric.real)(metric.dim)
        with torch.no_grad():
            for _, images in read_batches(files, preprocess, 16, broken={}):
                seen.update(metric.features(metric.eight_bit(images.to(device))))
        found = seen.moments()
        keep(key, found)
    return found


def use(
    metrics: Mapping[str, Metric], source: Path | None, preprocess: Preprocess, device: torch.device, *, why: str = ""
) -> None:
    """Compare with another set in place of the originals: the pictures of a folder, or an .npz of statistics.

    Every process has to call it; the first one computes. `why` says of metrics that are left out why they are.

    Raises:
        ValueError: None of the metrics is a Frechet distance, or the .npz does not fit one.
    """
    if source is None:
        return
    frechet = [metric for metric in metrics.values() if isinstance(metric, FrechetMetric)]
    if not frechet:
        raise ValueError(f"A reference is for Frechet distances, e.g. rfid; none is among {list(metrics)}.{why}")
    for metric in frechet:
        if source.suffix == ".npz":
            metric.compare_with_file(source)
        else:
            moments = of_first(lambda m=metric: of_folder(m, source, preprocess, device))
            metric.reference, metric.reference_name = moments, f"the pictures of {source}"
            metric.reference_sha256 = None
