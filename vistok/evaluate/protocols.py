"""The protocols behind published rFID and IS: what each fixes, and the command for every published figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vistok import assets
from vistok.evaluate.distribution import PUBLISHED_N
from vistok.evaluate.inception_score import RULES
from vistok.registry import Info, info, list_names, nearest

RESIZES = {
    "tensorflow": "to 299 x 299 as TensorFlow 1 does: bilinear, corner-aligned, no antialias; then (x - 128) / 128",
    "pytorch_fid": "to 299 x 299 bilinear, centred pixels, no antialias; then 2 x / 255 - 1",
    "clean": "to 299 x 299 bicubic with antialias on floats (Pillow), clipped to 0..255, not rounded; (x - 128) / 128",
}
VALIDATION = "ImageNet-1k validation, all 50,000 pictures, in the order of their sorted paths"
COMMAND = "vistok eval {model} --protocol {protocol} --data imagenet/val --metrics {metrics} --out out/{model}{more}"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way in which published rFID and IS were measured.

    Attributes:
        name: What `vistok eval --protocol` takes.
        summary: Whose it is.
        rfid: Settings of the metric `rfid`.
        pictures: How many pictures the published figures are over.
        source: Where its facts stand.
        differs: What the official program does in another way; empty if nothing is known.
    """

    name: str
    summary: str
    rfid: Mapping[str, Any]
    source: str
    pictures: int = PUBLISHED_N
    differs: str = ""

    @property
    def specs(self) -> dict[str, dict[str, Any]]:
        """Specs of its metrics, by the name they are reported under."""
        return {"rfid": {"name": "rfid", **self.rfid}}

    def fixes(self) -> dict[str, str]:
        """Everything that the figures depend on, in words."""
        network = assets.ASSETS["inception"].sources[0]
        reference = self.rfid.get("reference")
        against = "the originals of the same pictures, preprocessed alike, statistics kept by hash"
        if reference is not None:
            asset = assets.ASSETS[reference]
            digest = asset.sources[0].sha256 or "not known; the one used is written down"
            against = f"{asset.sources[0].filename} (asset {reference}, SHA-256 {digest}): {asset.summary}"
        eight_bit = "clamped to [0, 1], times 255, rounded to the nearest 8-bit value"
        return {
            "pictures": VALIDATION if self.pictures == PUBLISHED_N else f"{self.pictures} pictures",
            "resize and crop": "the tokenizer's own preprocessing (vistok info NAME), written down in metrics.json",
            "reconstructions": eight_bit if self.rfid.get("quantise", True) else "clamped to [0, 1], not rounded",
            "network": f"Inception-v3 2015-12-05 (torch-fidelity), {network.filename}, SHA-256 {network.sha256}...",
            "features": "pool3, 2048 values; covariance divided by n - 1; float64",
            "resize for the network": RESIZES[self.rfid.get("resize", "tensorflow")],
            "reference": against,
            "Inception score": f"1008 logits without bias; {RULES[self.rfid['inception_score']]}",
            "source": self.source,
            **({"differs": self.differs} if self.differs else {}),
        }

    def deviations(self, pictures: int) -> list[str]:
        """In what an evaluation does not follow the protocol."""
        if pictures == self.pictures:
            return []
        return [f"{pictures} pictures instead of {self.pictures}"]

    def facts(self, pictures: int) -> dict[str, Any]:
        """What goes into `metrics.json`."""
        return {"name": self.name, "fixes": self.fixes(), "deviations": self.deviations(pictures)}


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            name="titok",
            summary="evaluator of bytedance/1d-tokenizer: TiTok, TA-TiTok, One-D-Piece",
            rfid={"resize": "tensorflow", "inception_score": "whole"},
            source="evaluator/evaluator.py and utils/train_utils.py of github.com/bytedance/1d-tokenizer",
        ),
        Protocol(
            name="torch_fidelity",
            summary="torch-fidelity's FID and ISC of two folders of PNG files",
            rfid={"resize": "tensorflow", "inception_score": "torch_fidelity"},
            source="torch-fidelity 0.4 (inception-v3-compat, isc_splits 10, rng_seed 2020)",
        ),
        Protocol(
            name="adm",
            summary="ADM's evaluator against its reference batch of the ImageNet training set (as gFID)",
            rfid={"resize": "tensorflow", "inception_score": "adm", "reference": "adm_imagenet256"},
            source="evaluations/evaluator.py of github.com/openai/guided-diffusion",
            differs="the network there is the TensorFlow graph classify_image_graph_def.pb; ours is a port of it",
        ),
        Protocol(
            name="adm_originals",
            summary="ADM's evaluator against the originals: LlamaGen, GigaTok",
            rfid={"resize": "tensorflow", "inception_score": "adm"},
            source="tokenizer/tokenizer_image/reconstruction_ddp.py of github.com/SilentView/GigaTok; it does not name "
            "the reference file",
            differs="the network there is the TensorFlow graph classify_image_graph_def.pb; their crop halves large "
            "pictures with a box filter before the bicubic resize",
        ),
        Protocol(
            name="clean_fid",
            summary="clean-fid, mode clean",
            rfid={"resize": "clean", "inception_score": "whole"},
            source="cleanfid/resize.py and cleanfid/inception_torchscript.py of github.com/GaParmar/clean-fid",
            differs="the network is NVIDIA's TorchScript port of the same graph; clean-fid has no Inception score",
        ),
        Protocol(
            name="pytorch_fid",
            summary="pytorch-fid of two folders of PNG files",
            rfid={"resize": "pytorch_fid", "inception_score": "whole"},
            source="github.com/mseitzer/pytorch-fid 0.3",
            differs="pytorch-fid has no Inception score",
        ),
        Protocol(
            name="wetok",
            summary="evaluation of WeTok: pytorch-fid's network on pictures that are not rounded",
            rfid={"resize": "pytorch_fid", "inception_score": "whole", "quantise": False},
            source="evaluation_image_ddp.py of github.com/zhuangshaobin/WeTok",
            differs="PSNR and SSIM there are of pictures truncated to 8 bits, averaged over batches",
        ),
    )
}


def find(name: str) -> Protocol:
    """A protocol by name.

    Raises:
        KeyError: No such protocol; names the nearest.
    """
    if name not in PROTOCOLS:
        raise KeyError(f"No protocol named {name!r}. {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published row and how to measure it.

    Attributes:
        model: Preset.
        figures: Published figures.
        source: Where they stand.
        protocol: Name of the protocol, empty where none was published.
        command: What measures them; with `torch_fidelity` where the protocol is not known.
    """

    model: str
    figures: Mapping[str, float]
    source: str
    protocol: str
    command: str = field(default="")


def published(pattern: str = "*") -> list[Published]:
    """Every tokenizer preset with a published rFID, with its command."""
    found = (info(name, "tokenizer") for name in list_names("tokenizer", pattern, pretrained=True))
    return [_published(entry) for entry in found if entry.weights and "rFID" in entry.weights.figures]


def _published(entry: Info) -> Published:
    assert entry.weights is not None
    known = entry.weights.protocol
    metrics = ["psnr", "ssim", "lpips_vgg" if "LPIPS" in entry.weights.figures else "lpips_alex"]
    command = COMMAND.format(
        model=entry.name, protocol=known or "torch_fidelity", metrics=",".join(metrics), more=entry.weights.options
    )
    return Published(
        model=entry.name,
        figures=entry.weights.figures,
        source=entry.weights.source,
        protocol=known,
        command=command,
    )


def rows(pattern: str = "*") -> tuple[Sequence[str], list[list[str]]]:
    """The table of published figures: columns and cells."""
    cells = [
        [
            row.model,
            ", ".join(f"{name} {value:g}" for name, value in row.figures.items()),
            row.protocol or "not published",
            row.command,
            row.source,
        ]
        for row in published(pattern)
    ]
    return ("tokenizer", "published", "protocol", "command", "source"), cells
