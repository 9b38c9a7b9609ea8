"""What a tokenizer's features know about classes: nearest neighbours and a linear probe on a labelled set.

train, test = labelled_folder("pictures")
result = probe(vistok.load("runs/quickstart/tokenizer"), train, test, point="codes", pool="mean")
result.linear, result.knn[5]
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.data.base import Dataset, PictureFiles, Sample, files_of, fingerprint, keyed
from vistok.evaluate import protocol
from vistok.evaluate.classify import FOLD, choose_penalty, fit_linear, nearest_neighbours
from vistok.evaluate.intervals import bootstrap_interval
from vistok.image import find_pictures, to_pil, to_tensor
from vistok.registry import nearest
from vistok.tokenizers.base import Tokenizer

Pool = Literal["mean", "flat"]
POINTS = ("features", "codes", "published")
NEIGHBOURS = 20
TEST_SHARE = 5
"""Of a folder without parts of its own, one picture in so many is for testing."""


DEFINITIONS = {
    "linear": "multinomial logistic regression on standardised features, mean loss + penalty / 2 |weight|^2, L-BFGS",
    "knn": "majority vote of the nearest by cosine similarity",
    "penalty_chosen_on": f"every {FOLD}th training picture",
}


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracies on the test set, each a share of its pictures.

    Attributes:
        linear: Of the linear probe.
        knn: Number of neighbours -> accuracy of their vote.
        intervals: Ends of the 95 % bootstrap interval over test pictures, of `linear` and of `knn_1` ... `knn_20`.
        chance: Share of the class that is most frequent in training: what a probe that sees nothing gets.
        per_class: Class -> share of its test pictures that the linear probe gets right.
        classes: Number of classes.
        pictures: Pictures used, of `train` and `test`.
        tokens: Positions at the point before pooling.
        width: Numbers per picture after pooling.
        penalty: L2 penalty of the linear probe.
        skipped: Picture -> why it could not be used.
        protocol: Everything the figures depend on.
    """

    linear: float
    knn: dict[int, float]
    intervals: dict[str, tuple[float, float]]
    chance: float
    per_class: dict[str, float]
    classes: int
    pictures: dict[str, int]
    tokens: int
    width: int
    penalty: float
    skipped: dict[str, str]
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**vars(self), "knn": {str(k): v for k, v in self.knn.items()}}


@dataclass(frozen=True)
class LabelledFiles(PictureFiles):
    """Picture files with a class each; a `Dataset`."""

    files: list[Path]
    labels: list[int]
    classes: list[str]

    def read(self, index: int) -> Sample:
        """Open one picture; a damaged file is a `PictureError`."""
        return Sample(picture=to_pil(self.files[index]), label=self.labels[index])


def labelled_folder(folder: str | Path) -> tuple[LabelledFiles, LabelledFiles]:
    """The training and the test part of a folder whose sub-folders are classes.

    If it has sub-folders `train` and `test` (or `val`), these are the parts. Otherwise about every fifth picture is for
    testing; which ones depends on their names alone, so that adding pictures moves none.

    Raises:
        FileNotFoundError: No pictures there.
        ValueError: Fewer than two classes, or nothing to test on.
    """
    root = Path(folder).expanduser()
    if (root / "train").is_dir():
        parts = [_classes_below(root / name) for name in ("train", "test" if (root / "test").is_dir() else "val")]
    else:
        found = _classes_below(root)
        chosen = [zlib.crc32(p.relative_to(root).as_posix().encode()) % TEST_SHARE == 0 for p, _ in found]
        parts = [[pair for pair, test in zip(found, chosen) if test == wanted] for wanted in (False, True)]
    classes = sorted({label for part in parts for _, label in part})
    if len(classes) < 2 or not all(parts):
        raise ValueError(
            f"A probe needs sub-folders that are classes, at least two, and pictures to train and to test on; {root} "
            f"has {len(classes)} classes, {len(parts[0])} pictures to train and {len(parts[1])} to test on."
        )
    train, test = (
        LabelledFiles([p for p, _ in part], [classes.index(label) for _, label in part], classes) for part in parts
    )
    return train, test


def _classes_below(root: Path) -> list[tuple[Path, str]]:
    """Pictures in sub-folders with the name of the outermost one, sorted."""
    found = ((path, path.relative_to(root).parts) for path in find_pictures(root))
    return [(path, parts[0]) for path, parts in found if len(parts) > 1]


def probe(
    tokenizer: Tokenizer,
    train: Dataset,
    test: Dataset,
    *,
    point: str = "features",
    pool: Pool = "mean",
    num_tokens: int | None = None,
    neighbours: int = NEIGHBOURS,
    penalty: float | None = None,
    limit: int | None = None,
    batch: int = 32,
    name: str = "",
    command: str = "",
    progress: Callable[[int], None] | None = None,
) -> ProbeResult:
    """Classify pictures by a tokenizer's features at a point.

    Nearest neighbours vote by cosine similarity of the features as they are. The linear probe is a multinomial logistic
    regression on standardised features, solved to the end, so neither depends on a seed or a learning rate. Pictures
    are preprocessed as for encoding, without augmentation.

    Args:
        tokenizer: The model; it is put into eval mode for the time being.
        train: Labelled pictures to learn from.
        test: Labelled pictures of the same classes.
        point: `features` (before the quantizer), `codes` (behind it), or the path of a submodule, e.g.
            `encoder.transformer.blocks.3`; its output is (B, N, D), (B, D) or (B, C, h, w). `published`: where the
            tokenizer's authors probe it (`probe_point`).
        pool: `mean` over positions, or `flat`: all of them side by side.
        num_tokens: Use only this many tokens (nested tokenizers, point `codes`).
        neighbours: Largest number of neighbours.
        penalty: L2 penalty of the linear probe; None chooses on a fifth of the training pictures.
        limit: Use at most this many pictures of each set, drawn with a fixed seed.
        batch: Pictures at once.
        name: What to call the model; its registered name if empty.
        command: Command that repeats it; empty for that of this process.
        progress: Called with the number of pictures done, after every batch.

    Raises:
        ValueError: Pictures without labels, different classes in the two sets, none that can be read, no such point,
            or one without a number of positions common to all pictures while `pool` is `flat`.
    """
    check_point(tokenizer, point)
    point = tokenizer.probe_point if point == "published" else point
    names = _class_names(train, test)
    reader = _Reader(tokenizer, point, pool, num_tokens, batch, progress or (lambda done: None))
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        with torch.no_grad():
            learnt, asked = reader.read(train, limit), reader.read(test, limit)
    finally:
        tokenizer.train(was_training)
    names = names or [str(i) for i in range(int(max(learnt.labels.max(), asked.labels.max())) + 1)]
    right, penalty, scores = _classify(learnt, asked, len(names), neighbours, penalty)
    shares = {key: float(values.mean()) for key, values in right.items()}
    settings = {"point": point, "pool": pool, "num_tokens": num_tokens, "batch": batch, "limit": limit}
    return ProbeResult(
        linear=shares["linear"],
        knn={int(key[4:]): share for key, share in shares.items() if key != "linear"},
        intervals={key: bootstrap_interval(values) for key, values in right.items()},
        chance=float((asked.labels == learnt.labels.bincount().argmax()).double().mean()),
        per_class={names[c]: float(right["linear"][asked.labels == c].mean()) for c in asked.labels.unique().tolist()},
        classes=len(names),
        pictures={"train": len(learnt.labels), "test": len(asked.labels)},
        tokens=learnt.tokens,
        width=learnt.features.shape[1],
        penalty=penalty,
        skipped={**learnt.skipped, **asked.skipped},
        protocol=protocol.collect(
            data={"train": _data_facts(train, learnt.used), "test": _data_facts(test, asked.used)},
            model=protocol.model_facts(tokenizer, name or tokenizer.registry_name),
            preprocess=tokenizer.preprocess,
            metrics={},
            command_line=command or None,
            settings={**settings, **DEFINITIONS, "penalty_scores": {f"{p:g}": v for p, v in scores.items()}},
        ),
    )


def _classify(
    learnt: _Features, asked: _Features, classes: int, neighbours: int, penalty: float | None
) -> tuple[dict[str, Tensor], float, dict[float, float]]:
    """1 for each test picture that is right, else 0, by `linear`, `knn_1`, ...; the penalty; what it was chosen by."""
    scores: dict[float, float] = {}
    if penalty is None:
        penalty, scores = choose_penalty(learnt.features, learnt.labels, classes=classes)
    linear = fit_linear(learnt.features, learnt.labels, classes=classes, penalty=penalty)
    votes = nearest_neighbours(learnt.features, learnt.labels, asked.features, classes=classes, most=neighbours)
    found = {"linear": linear(asked.features), **{f"knn_{k}": row for k, row in enumerate(votes, 1)}}
    return {key: (values == asked.labels).double() for key, values in found.items()}, penalty, scores


@dataclass
class _Features:
    """Features of one set: (n, D), classes (n,), positions before pooling, indices used, pictures left out."""

    features: Tensor
    labels: Tensor
    tokens: int
    used: list[int]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class _Reader:
    """Turns a data set into features."""

    tokenizer: Tokenizer
    point: str
    pool: Pool
    num_tokens: int | None
    batch: int
    progress: Callable[[int], None]
    done: int = 0

    def read(self, dataset: Dataset, limit: int | None) -> _Features:
        """Features of a data set, or of some of its pictures, in its order."""
        skipped: dict[str, str] = {}
        rows, labels, used, tokens = [], [], [], 0
        for indices, classes, images in self._batches(dataset, _drawn(len(dataset), limit), skipped):
            found, mask = self._at_point(images.to(self.tokenizer.device))
            tokens = max(tokens, found.shape[1])
            rows.append(self._pooled(found.float(), mask).cpu())
            labels += classes
            used += indices
            self.done += len(indices)
            self.progress(self.done)
        if not rows:
            raise ValueError(
                f"None of the {len(dataset)} pictures can be read. The first: {next(iter(skipped.items()))}"
            )
        if len({row.shape[1] for row in rows}) > 1:
            raise ValueError(
                "The pictures have different numbers of positions, so they cannot be flat. Use pool='mean'."
            )
        return _Features(torch.cat(rows), torch.tensor(labels), tokens, used, skipped)

    def _batches(
        self, dataset: Dataset, indices: Sequence[int], skipped: dict[str, str]
    ) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Indices, classes and preprocessed pictures of one size, in batches."""
        held: list[tuple[int, int, Tensor]] = []
        for index in indices:
            try:
                sample = dataset.read(index)
                picture = to_tensor(sample.picture, self.tokenizer.preprocess)[0]
            except (OSError, ValueError) as err:  # a broken picture
                skipped[dataset.name(index)] = str(err)
                continue
            if sample.label is None:
                raise ValueError(f"{dataset.name(index)} has no class. Build the data set with labels=true.")
            if held and (len(held) == self.batch or held[0][2].shape != picture.shape):
                yield [i for i, _, _ in held], [c for _, c, _ in held], torch.stack([p for _, _, p in held])
                held = []
            held.append((index, sample.label, picture))
        if held:
            yield [i for i, _, _ in held], [c for _, c, _ in held], torch.stack([p for _, _, p in held])

    def _at_point(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, N, D), and which positions count, (B, N), None for all."""
        if self.num_tokens is not None and self.point != "codes":
            raise ValueError(f"num_tokens cuts tokens, so it goes with point='codes', not {self.point!r}.")
        if self.point == "features":
            return self.tokenizer.encode_features(images), None
        if self.point == "codes":
            tokens = self.tokenizer.encode(images, self.num_tokens)
            codes = self.tokenizer.tokens_to_codes(tokens) if tokens.codes is None else tokens.codes
            return codes, tokens.mask
        with _recorded(self.tokenizer, self.point) as outputs:
            tokens = self.tokenizer.encode(images)
            if not outputs:
                self.tokenizer.decode(tokens)
        return _sequence(outputs, self.point, len(images)), None

    def _pooled(self, found: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, D) -> (B, D), or (B, N * D) for `flat`."""
        if self.pool == "flat":
            return found.flatten(1) if mask is None else (found * mask.unsqueeze(-1)).flatten(1)
        if mask is None:
            return found.mean(1)
        kept = mask.unsqueeze(-1).to(found.dtype)
        return (found * kept).sum(1) / kept.sum(1)


def _drawn(count: int, limit: int | None) -> list[int]:
    """All indices, or `limit` of them drawn with a fixed seed, in order."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(int(i) for i in keyed(0, "probe", count).permutation(count)[:limit])


def check_point(tokenizer: nn.Module, point: str) -> None:
    """Refuse a point that the tokenizer does not have.

    Raises:
        ValueError: Names the nearest.
    """
    known = [name for name, _ in tokenizer.named_modules() if name]
    if point not in (*POINTS, *known):
        raise ValueError(
            f"point: {point!r} is neither 'features', 'codes' nor a submodule. {nearest(point, known) or known[:8]}"
        )


@contextmanager
def _recorded(tokenizer: nn.Module, path: str) -> Iterator[list[Any]]:
    """A list that receives the outputs of a submodule."""
    outputs: list[Any] = []
    handle = tokenizer.get_submodule(path).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _sequence(outputs: list[Any], path: str, batch: int) -> Tensor:
    """The last output of a submodule as (B, N, D)."""
    if not outputs:
        raise ValueError(f"point: {path!r} runs neither in encode nor in decode. Choose another submodule.")
    found = outputs[-1][0] if isinstance(outputs[-1], (tuple, list)) else outputs[-1]
    if not isinstance(found, Tensor) or found.ndim not in (2, 3, 4) or len(found) != batch:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"point: {path!r} gives {shape}, not (B, N, D), (B, D) or (B, C, h, w) with B = {batch}.")
    if found.ndim == 2:
        return found.unsqueeze(1)
    return found.flatten(2).transpose(1, 2) if found.ndim == 4 else found


def _class_names(train: Dataset, test: Dataset) -> list[str]:
    """Names of the classes that the two sets agree on; empty if they have none."""
    ours, theirs = (list(getattr(dataset, "classes", [])) for dataset in (train, test))
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs))[:5]
        raise ValueError(
            f"The two sets have different classes ({len(ours)} and {len(theirs)}; only one has {', '.join(odd)})."
        )
    return ours


def _data_facts(dataset: Dataset, used: Sequence[int]) -> dict[str, Any]:
    files = files_of(dataset)
    if files is None:
        return {"name": type(dataset).__name__, "pictures": len(used), "fingerprint": fingerprint(dataset)}
    chosen = [files[i] for i in used]
    root = os.path.commonpath([file.resolve().parent for file in chosen])
    return protocol.data_facts(root, chosen, root=root)
