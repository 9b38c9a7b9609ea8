"""Frozen text encoders for tokenizers that read captions: CLIP (open_clip), T5 (transformers), fixed word vectors."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vistok.hub import LoadError

Encode = Callable[[Sequence[str], torch.device], Tensor]


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """Which frozen model turns captions into features, and their shape.

    Its weights are no part of the tokenizer's; they are loaded at the first caption. Features of the last layer are
    used, of all positions, without pooling or projection.

    Attributes:
        kind: `clip` (a text tower of open_clip), `t5` (an encoder of transformers), or `words`: a fixed random vector
            for every word, which needs no weights and is meant for tests and small recipes.
        model: For `clip` a name of open_clip, `hf-hub:org/name` or `local-dir:FOLDER`; for `t5` a hub id or a folder.
        pretrained: For `clip` with a name: open_clip's tag or a weight file.
        length: Text tokens, L; captions are cut or padded to it.
        dim: Width of the features, D.
        precision: Of the text encoder's weights.
        cache: Folder in which features are kept between runs, a file per caption; null for memory only.
        cache_mb: Memory for the features of captions seen; the ones used longest ago go first.
    """

    kind: Literal["clip", "t5", "words"] = "clip"
    model: str = ""
    pretrained: str | None = None
    length: int = 77
    dim: int = 768
    precision: Literal["fp32", "bf16"] = "fp32"
    cache: str | None = None
    cache_mb: float = 1024.0

    @property
    def title(self) -> str:
        """What to call it in a message."""
        return " ".join(part for part in (self.kind, self.model, self.pretrained) if part)


class Texts:
    """Captions to features, each caption encoded once.

    A plain object, so that the text encoder's weights are neither saved nor trained with the tokenizer that holds it.

    Args:
        spec: The encoder.

    Attributes:
        encoded: Captions that went through the encoder so far.
    """

    def __init__(self, spec: TextEncoder) -> None:
        if spec.length < 1 or spec.dim < 1:
            raise ValueError(f"A text encoder gives at least 1 token of 1 channel, got {spec.length} x {spec.dim}.")
        self.spec, self.encoded = spec, 0
        self._encode: Encode | None = None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._most = max(1, int(spec.cache_mb * 2**20 / (4 * spec.length * spec.dim)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Texts:
        """The same object: it is frozen, and a copy would load its weights again."""
        return self

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """Features of captions, float32, (B, L, D), on `device`.

        Raises:
            LoadError: The encoder's weights cannot be had, or it gives features of another shape.
        """
        found = {text: self._known(text) for text in dict.fromkeys(captions)}
        missing = [text for text, features in found.items() if features is None]
        if missing:
            if self._encode is None:
                self._encode = load(self.spec)
            with torch.autocast(device.type, enabled=False):
                made = self._encode(missing, device).float().cpu()
            self._check(made, len(missing))
            self.encoded += len(missing)
            for text, features in zip(missing, made):
                found[text] = features.clone()
                self._store(text, found[text])
        return torch.stack([found[text] for text in captions]).to(device)  # type: ignore[misc]

    def _known(self, text: str) -> Tensor | None:
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        file = self._file(text)
        if file is None or not file.is_file():
            return None
        from vistok.unpickle import read_tensors

        features = read_tensors(file)["features"].float()
        self._check(features[None], 1)
        self._remember(text, features)
        return features

    def _store(self, text: str, features: Tensor) -> None:
        self._remember(text, features)
        file = self._file(text)
        if file is not None:
            from safetensors.torch import save

            from vistok.hub import write_atomic

            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, save({"features": features}))

    def _remember(self, text: str, features: Tensor) -> None:
        self._kept[text] = features
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _file(self, text: str) -> Path | None:
        if self.spec.cache is None:
            return None
        s = self.spec
        key = "\n".join((s.kind, s.model, str(s.pretrained), str(s.length), str(s.dim), s.precision, text))
        name = hashlib.sha256(key.encode()).hexdigest()
        return Path(s.cache).expanduser() / name[:2] / f"{name}.safetensors"

    def _check(self, features: Tensor, count: int) -> None:
        want = (count, self.spec.length, self.spec.dim)
        if tuple(features.shape) != want:
            raise LoadError(
                f"Text encoder {self.spec.title} gives features {tuple(features.shape[1:])} per caption, the tokenizer "
                f"was built for {want[1:]} (text_encoder.length and .dim)."
            )


def load(spec: TextEncoder) -> Encode:
    """The function behind a specification, with its weights.

    Raises:
        LoadError: They cannot be had; says what to do.
    """
    try:
        return {"clip": _clip, "t5": _t5, "words": _words}[spec.kind](spec)
    except ImportError as err:
        package = {"clip": "open_clip_torch", "t5": "transformers"}[spec.kind]
        raise LoadError(f"Text encoder {spec.title} needs a package: pip install {package}. ({err})") from err
    except Exception as err:  # libraries raise many types for what is absent, damaged or unreachable
        reason = " ".join(str(err).split())[:300]
        raise LoadError(
            f"Text encoder {spec.title} cannot be loaded: {reason} Set text_encoder.model to a local copy, or give "
            f"text features (B, {spec.length}, {spec.dim}) as `text`."
        ) from err


def _clip(spec: TextEncoder) -> Encode:
    """CLIP's text tower up to its last layer norm, (B, L, D)."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(spec.model, spec.pretrained) if spec.pretrained else {}
    # the activation belongs to the weights: OpenAI's want QuickGELU also under a model name without it
    model = open_clip.create_model(
        spec.model,
        pretrained=spec.pretrained,
        precision="fp32",
        force_quick_gelu=bool(tag.get("quick_gelu", False)),
        require_pretrained=True,
    )
    tower: Any = getattr(model, "text", model)
    tokenize = open_clip.get_tokenizer(spec.model, context_length=spec.length)
    if tower is model:
        model.visual = None
    tower = _frozen(tower, spec)
    dtype = tower.token_embedding.weight.dtype

    def encode(captions: Sequence[str], device: torch.device) -> Tensor:
        tower.to(device)
        ids = tokenize(list(captions)).to(device)  # (B, L)
        n = ids.shape[1]
        x = tower.token_embedding(ids) + tower.positional_embedding[:n].to(dtype)
        mask = None if tower.attn_mask is None else tower.attn_mask[:n, :n].to(device)
        x = tower.transformer(x, attn_mask=mask)
        return tower.ln_final(x)

    return encode


def _t5(spec: TextEncoder) -> Encode:
    """Last hidden states of a T5 encoder, zero at padding, (B, L, D)."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    model = _frozen(T5EncoderModel.from_pretrained(spec.model), spec)

    def encode(captions: Sequence[str], device: torch.device) -> Tensor:
        model.to(device)
        found = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=spec.length, return_tensors="pt"
        ).to(device)
        x = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).last_hidden_state
        return x * found["attention_mask"].unsqueeze(-1)

    return encode


def _words(spec: TextEncoder) -> Encode:
    """A fixed Gaussian vector for each of the first L words, zero behind them, (B, L, D)."""

    def vector(word: str) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(spec.dim, dtype=np.float32)

    def encode(captions: Sequence[str], device: torch.device) -> Tensor:
        out = np.zeros((len(captions), spec.length, spec.dim), dtype=np.float32)
        for row, caption in zip(out, captions):
            for place, word in enumerate(re.findall(r"\w+", caption.lower())[: spec.length]):
                row[place] = vector(word)
        return torch.from_numpy(out).to(device)

    return encode


def _frozen(module: Any, spec: TextEncoder) -> Any:
    return module.eval().requires_grad_(False).to(torch.bfloat16 if spec.precision == "bf16" else torch.float32)
