"""`vistok.load`: a published or own model from a preset's name, a folder or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok import hub
from vistok.assets import SHIPPED
from vistok.codec.prior import Prior
from vistok.codec.prior import read as read_prior
from vistok.registry import list_names, nearest, registry
from vistok.tokenizers.base import Tokenizer
from vistok.tokenizers.official.layout import read_checkpoint


def load(
    source: str | Path,
    *,
    config: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
) -> Any:
    """Load a tokenizer (or a trained compressor) with its weights, strictly, ready for inference.

    Args:
        source: A preset with weights (`vistok.list("tokenizer", pretrained=True)`), a folder, or `hf-hub:org/name`.
            A single weight file of an official project works too. Folders in vistok's own format and in the official
            ones (a weight file beside its YAML, for one) are recognised by their configuration and keys.
        config: Configuration of official weights that lie elsewhere: YAML, JSON, or Python assignments, read as data.
        image_size: (H, W) for pictures of another size (position tables are interpolated); the trained size if None. Of
            tokenizers.
        device: Where to put it.
        dtype: Precision of the weights; ids are computed in float32 from the quantizer's projection on.
        kind: What it has to be, `tokenizer` or `compressor`; either if None.

    Raises:
        LoadError: Nothing there, an unknown format, another kind, or weights that do not fit; lists what does not.

    Example:
        >>> tok = vistok.load("titok_s128.in1k")             # or a folder, or hf-hub:org/name
        >>> pictures = tok.decode(tok.encode("photo.jpg"))
    """
    found = _load(source, config)
    if kind is not None and found.registry_kind != kind:
        raise hub.LoadError(f"{source} holds a {type(found).__name__}, not a {kind}.")
    if isinstance(found, Tokenizer):
        found.prior = _prior(source)
    if image_size is not None:
        if not isinstance(found, Tokenizer):
            raise hub.LoadError(f"{source} holds a {type(found).__name__}, which has no image_size. Leave it out.")
        found = found.resized(image_size)
    return found.eval().to(device=device, dtype=dtype)


def _load(source: str | Path, config_file: str | Path | None) -> Any:
    config, tensors = _read(source, config_file)
    if config.get("format") == hub.FORMAT:
        kind = config.get("kind")
        if isinstance(kind, str) and kind not in hub.KEPT:
            raise hub.LoadError(f"{source} holds a {kind!r}, and vistok.load reads: {', '.join(hub.KEPT)}.")
        return hub.build_saved(config, tensors, str(source))
    return _from_official(config, tensors, str(source))


def _prior(source: str | Path) -> Prior | None:
    """The entropy coder's prior of whatever `source` names; it stands beside weights in vistok's own format."""
    preset = registry("tokenizer").presets.get(str(source))
    if preset is not None and preset.weights is not None:
        return read_prior(SHIPPED / preset.weights.shipped) if preset.weights.shipped else None
    if str(source).startswith(hub.HUB_PREFIX):
        return read_prior(hub.locate(source))
    return read_prior(source)  # a file has nothing beside it


def _read(source: str | Path, config_file: str | Path | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration (empty for a single weight file) and tensors of whatever `source` names."""
    presets = registry("tokenizer")
    if isinstance(source, str) and source in presets.names():
        preset = presets.presets.get(source)
        if preset is None or preset.weights is None:
            create_it = f"vistok.create('tokenizer', {source!r})"
            raise hub.LoadError(f"{source!r} has no published weights. Build it untrained with {create_it}.")
        weights = preset.weights
        if weights.shipped:
            return hub.read_folder(SHIPPED / weights.shipped)
        if not weights.hub:
            raise hub.LoadError(
                f"The weights of {source!r} are on no hub. Download {weights.filename} (see {weights.source}) and load "
                "that file."
            )
        if weights.filename == hub.WEIGHTS:
            return hub.read_folder(hub.HUB_PREFIX + weights.hub)
        return read_checkpoint(hub.fetch_file(weights.hub, weights.filename), config_file)
    if Path(source).is_file() or config_file is not None:
        return read_checkpoint(source, config_file)
    if not str(source).startswith(hub.HUB_PREFIX) and not Path(source).is_dir():
        names = list_names("tokenizer", pretrained=True)
        here = ", ".join(name for name in names if getattr(presets.presets[name].weights, "shipped", None))
        raise hub.LoadError(
            f"{str(source)!r} is no preset with weights, no folder and no file. {nearest(str(source), names)} "
            f"Weights that come along: {here}. For the hub write hf-hub:org/name."
        )
    folder = hub.locate(source)
    return hub.read_folder(folder) if (folder / hub.CONFIG).is_file() else read_checkpoint(folder)


def _from_official(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Any:
    for kind in hub.KEPT:
        registry(kind).fill()
    for layout in hub.FORMATS:
        if layout.recognises(config, tensors):
            try:
                name, ours, renamed = layout.convert(config, tensors)
            except (KeyError, IndexError, TypeError, AttributeError) as err:  # configuration and tensors disagree
                raise hub.LoadError(
                    f"{source} looks like {layout.name}, but is incomplete or altered: {type(err).__name__}: {err}."
                ) from err
            found = hub.create_saved(layout.kind, name, ours, source)
            hub.load_strictly(found, renamed, source)
            return found
    known = "; ".join(f.name for f in hub.FORMATS)
    raise hub.LoadError(f"{source} is in no format vistok knows. Known: vistok's own; {known}.")
