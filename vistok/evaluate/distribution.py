"""Distances between the distributions of originals and reconstructions: rFID with IS, and `fd_effnet_lite0`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok import assets
from vistok.evaluate.fid import FeatureStatistics, Moments, frechet_distance, read_statistics
from vistok.evaluate.inception_score import InceptionScore, Rule
from vistok.evaluate.metric import Metric
from vistok.image import to_uint8
from vistok.losses.base import check_pair, freeze
from vistok.registry import register

PUBLISHED_N = 50_000  # published rFID is measured on this many pictures
LEAST_N = 2048  # below, the covariance of 2048 features has no full rank
SMALLEST_SIDE = 16


class FrechetMetric(Metric):
    """A Frechet distance between features of reconstructions and of originals (or of a reference file).

    A subclass implements `features`. Pictures are rounded to 8 bits in any case.
    """

    higher_is_better = False
    span = (0.0, float("inf"))
    decimals = 3
    least = SMALLEST_SIDE
    per_picture = False
    dim: ClassVar[int]

    def __init__(self, *, rounding: bool, reference: Path | None) -> None:
        if not rounding:
            raise ValueError(f"{self.title} is defined on 8-bit pictures: leave rounding on.")
        super().__init__(rounding=True)
        self.fake = FeatureStatistics(self.dim)
        self.real = FeatureStatistics(self.dim)
        self.originals: Moments | None = None
        self.reference: Moments | None = None
        self.reference_sha256: str | None = None
        self.reference_name = "the originals"
        if reference is not None:
            self.compare_with_file(assets.find(str(reference)) if str(reference) in assets.ASSETS else reference)

    def compare_with_file(self, file: Path) -> None:
        """Measure from the statistics of an .npz in place of the originals, see `read_statistics`.

        Raises:
            ValueError: No such file, or statistics of other features.
        """
        moments = read_statistics(file)
        if len(moments.mean) != self.dim:
            raise ValueError(
                f"{file} holds statistics of {len(moments.mean)} features, {self.title} has {self.dim}: they come from "
                f"another network or layer."
            )
        self.reference, self.reference_sha256 = moments, assets.sha256(file)
        self.reference_name = f"the file {file.name}"

    def features(self, pictures: Tensor) -> Tensor:
        """Features (B, dim) of uint8 pictures (B, 3, H, W)."""
        raise NotImplementedError

    def feature_facts(self) -> dict[str, Any]:
        """What the features of a picture depend on; statistics may be kept under it."""
        return {"features": self.definition, "dim": self.dim, "weights": self.weights_sha256}

    def eight_bit(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1] as the features take them: uint8."""
        return to_uint8(pictures.float())

    @torch.no_grad()
    def update(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Enter a batch, see `Metric.update`; there are no values per picture, so the result is empty, (0,)."""
        check_pair(reconstruction, target, least=self.least)
        with torch.autocast(target.device.type, enabled=False):
            self.fake.update(self._watched(self.eight_bit(reconstruction)))
            if self.reference is None and self.originals is None:
                self.real.update(self.features(self.eight_bit(target)))
        self.count += len(target)
        return reconstruction.new_empty(0)

    def _watched(self, pictures: Tensor) -> Tensor:
        """Features of reconstructions; a subclass may look at more on the way."""
        return self.features(pictures)

    def gather(self) -> None:
        """Add up the state of all processes. Call it once, after the last update, on every process."""
        super().gather()
        self.fake.gather()
        self.real.gather()

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        self.fake.reset()
        self.real.reset()

    def compute(self) -> float:
        """The distance over everything seen.

        Raises:
            ValueError: Fewer than two pictures were seen, or the reference file has features of another width.
        """
        return frechet_distance(self.fake.moments(), self.reference or self.originals or self.real.moments())

    def protocol(self) -> dict[str, Any]:
        """What the figure depends on, for JSON."""
        return {
            **super().protocol(),
            "against": self.reference_name,
            "reference_sha256": self.reference_sha256,
            "n": int(self.count),
        }


@register("metric", "rfid")
class ReconstructionFid(FrechetMetric):
    """Frechet distance on the 2048 features of the FID Inception network, and the Inception score on the way.

    The network is torch-fidelity's (extra `metrics`), its weights are yours to supply. pytorch-fid's network is the
    same bit for bit, but it is fed differently, see `resize`. The label carries the number of pictures below 50,000,
    and is not `rFID` below 2048. The Inception score of the reconstructions (1008 unbiased logits) is in `details`. The
    protocols of published tables are settings of these arguments, see `vistok.evaluate.protocols`.

    Args:
        rounding: Has to stay on.
        weights: The Inception file of torch-fidelity or pytorch-fid (one file under two names), None looks for it.
        reference: An .npz of reference statistics (ADM, pytorch-fid, ours), or the name of an asset that is one
            (`adm_imagenet256`), instead of the originals.
        resize: `tensorflow`: corner-aligned pixels and (x - 128) / 128, the original graph and torch-fidelity;
            `pytorch_fid`: centred pixels and 2 x / 255 - 1, which moves features by up to about 1 %; `clean`: bicubic
            with antialias, clipped to 0..255 and not rounded, then (x - 128) / 128 (clean-fid).
        inception_score: How pictures are split for the Inception score, see `InceptionScore`.
        quantise: Take pictures as 8-bit ones; off, as they come out of the decoder (only some tables do, and not with
            `tensorflow`).

    Raises:
        ImportError: torch-fidelity is not installed.
        AssetError: No weights on this machine; the message lists where they can come from.
    """

    title = "rFID"
    dim = 2048
    definition = "Frechet distance, Inception-v3 2015-12-05 pool3, bilinear resize to 299 without antialias"

    def __init__(
        self,
        *,
        rounding: bool = True,
        weights: Path | None = None,
        reference: Path | None = None,
        resize: Literal["tensorflow", "pytorch_fid", "clean"] = "tensorflow",
        inception_score: Rule = "whole",
        quantise: bool = True,
    ) -> None:
        if not quantise and resize == "tensorflow":
            raise ValueError("rFID with resize 'tensorflow' takes 8-bit pictures: leave quantise on.")
        super().__init__(rounding=rounding, reference=reference)
        self.quantise = quantise
        path = assets.find("inception", weights)
        self.weights_sha256 = assets.sha256(path)
        self.resize = resize
        self.network = _inception(path)
        self._resized: Tensor | None = None
        if resize != "tensorflow":  # torch-fidelity resizes inside, so the first convolution gets ours in its place
            self.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: (self._resized,))
        freeze(self)
        self.score = InceptionScore(inception_score)

    @property
    def label(self) -> str:
        """`rFID`, with the number of pictures where it is not the published 50,000."""
        n = int(self.count)
        if n < LEAST_N:
            return f"Inception Frechet distance (N={n}, too few for rFID)"
        return "rFID" if n >= PUBLISHED_N else f"rFID (N={n})"

    def features(self, pictures: Tensor) -> Tensor:
        """The 2048 pooled features, (B, 2048)."""
        return self._run(pictures)[0]

    def feature_facts(self) -> dict[str, Any]:
        """See `FrechetMetric.feature_facts`."""
        return {**super().feature_facts(), "resize": self.resize, "quantise": self.quantise}

    def eight_bit(self, pictures: Tensor) -> Tensor:
        """Pictures in [0, 1] as uint8, or as float in [0, 255] without `quantise`."""
        return super().eight_bit(pictures) if self.quantise else pictures.float().clamp(0, 1) * 255.0

    def _run(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        if self.resize != "tensorflow":
            self._resized = resized(pictures, self.resize)
        return self.network(pictures.to(torch.uint8))

    def _watched(self, pictures: Tensor) -> Tensor:
        features, logits = self._run(pictures)
        self.score.update(logits)
        return features

    def gather(self) -> None:
        """See `Metric.gather`."""
        super().gather()
        self.score.gather()

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        self.score.reset()

    def details(self) -> dict[str, float]:
        """`inception_score` of the reconstructions, its spread over splits, and `n`."""
        return {**self.score.compute(), "n": int(self.count)}

    def protocol(self) -> dict[str, Any]:
        """What the figure depends on, for JSON."""
        facts = super().protocol()
        return {
            **facts,
            "rounding": facts["rounding"] if self.quantise else "none",
            "resize": self.resize,
            "inception_score": self.score.rule,
        }


@register("metric", "fd_effnet_lite0")
class EfficientNetDistance(FrechetMetric):
    """Frechet distance on the 1280 pooled features of EfficientNet-Lite0; works offline and is not an FID.

    Pictures are resized to 224 x 224 (bicubic, antialias). It ranks degradations as FID does and its values mean
    nothing beside published FIDs, hence its own name.

    Args:
        rounding: Has to stay on.
        weights: The weight file of the carrier package, None looks for it.
        reference: An .npz of reference statistics on these features instead of the originals.

    Raises:
        AssetError: No weights on this machine; the message lists where they can come from.
    """

    title = "FD EfficientNet-Lite0"
    dim = 1280
    decimals = 2
    definition = "Frechet distance, EfficientNet-Lite0 pooled features at 224 px; not comparable with FID"

    def __init__(self, *, rounding: bool = True, weights: Path | None = None, reference: Path | None = None) -> None:
        super().__init__(rounding=rounding, reference=reference)
        path = assets.find("efficientnet_lite0", weights)
        self.weights_sha256 = assets.sha256(path)
        self.network = _effnet_lite0(path)
        freeze(self)

    @property
    def label(self) -> str:
        """The title with the number of pictures."""
        return f"{self.title} (N={int(self.count)})"

    def features(self, pictures: Tensor) -> Tensor:
        """The 1280 pooled features, (B, 1280)."""
        return _pooled(self.network, pictures.float() / 255.0)


@register("metric", "effnet_cosine")
class EfficientNetCosine(Metric):
    """Cosine between the 1280 pooled EfficientNet-Lite0 features of a reconstruction and of its original.

    A measure of kept meaning that works offline; pictures are resized to 224 x 224 (bicubic, antialias).

    Args:
        rounding: Round to the 256 values a saved picture has before measuring.
        weights: The weight file of the carrier package, None looks for it.

    Raises:
        AssetError: No weights on this machine; the message lists where they can come from.
    """

    title = "EfficientNet-Lite0 cosine"
    higher_is_better = True
    span = (-1.0, 1.0)
    least = SMALLEST_SIDE
    definition = "cosine of EfficientNet-Lite0 pooled features at 224 px"

    def __init__(self, *, rounding: bool = True, weights: Path | None = None) -> None:
        super().__init__(rounding=rounding)
        path = assets.find("efficientnet_lite0", weights)
        self.weights_sha256 = assets.sha256(path)
        self.network = _effnet_lite0(path)
        freeze(self)

    def measure(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """See `Metric.measure`."""
        return F.cosine_similarity(*(_pooled(self.network, x) for x in (reconstruction, target)), dim=1)


def _pooled(network: Any, pictures: Tensor) -> Tensor:
    """Features (B, 1280) of pictures (B, 3, H, W) in [0, 1]."""
    x = F.interpolate(pictures, size=(224, 224), mode="bicubic", antialias=True).clamp(0.0, 1.0)
    found: Tensor = network.forward_head(network.forward_features((x - 0.5) / 0.5), pre_logits=True)
    return found


def resized(pictures: Tensor, how: str) -> Tensor:
    """Pictures in [0, 255], (B, 3, H, W), as the network's first layer takes them: 299 x 299, around [-1, 1].

    Args:
        pictures: uint8 or float.
        how: `pytorch_fid` or `clean`, see `ReconstructionFid`.
    """
    if how == "pytorch_fid":
        return 2.0 * F.interpolate(pictures.float() / 255.0, size=(299, 299), mode="bilinear") - 1.0
    large = F.interpolate(pictures.float(), size=(299, 299), mode="bicubic", antialias=True)  # Pillow's, on floats
    return (large.clamp(0.0, 255.0) - 128.0) / 128.0


def _inception(path: Path) -> Any:
    """torch-fidelity's network with weights that were read inertly.

    It unpickles a file without restriction, so it is given a copy that holds nothing but the tensors.
    """
    table = assets.read_tensors(path)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as err:
        raise ImportError("rFID needs torch-fidelity: pip install 'vistok[metrics]'.") from err
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "inception.pth"
        torch.save(table, copy)
        try:
            return FeatureExtractorInceptionV3(
                "vistok", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy)
            )
        except RuntimeError as err:
            raise assets.UnreadableError(f"{path} is not the FID Inception network: {err}") from err


def _effnet_lite0(path: Path) -> nn.Module:
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    table = list(assets.read_tensors(path).values())
    wanted = network.state_dict()
    # the carrier's names differ from timm's, its order does not
    if [t.shape for t in table] != [t.shape for t in wanted.values()]:
        raise assets.UnreadableError(f"{path} does not hold the tensors of EfficientNet-Lite0 in their order.")
    network.load_state_dict(dict(zip(wanted, table)))
    return network
