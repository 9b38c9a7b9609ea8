"""The packer: hands compressed features to the language model in a prompt with fewer placeholders.

One place for positions, padding and what the caller gets back, for every method and family; grids, crops and newlines
are the business of `features`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.compress.method import FeatureMethod
from vistok.compress.reduction import pack, take
from vistok.compress.trained import TrainedMethod
from vistok.compress.vision import VisionMethod
from vistok.plugins.compressed import compressed
from vistok.plugins.families.base import PIXELS
from vistok.plugins.features import Encoded, compress
from vistok.plugins.layout import build, find
from vistok.plugins.merged import encode_merged
from vistok.plugins.pictures import Pictures
from vistok.plugins.smaller import downsampled

if TYPE_CHECKING:
    from vistok.plugins.runtime import Runtime

PROMPT = "_vistok_prompt"
PER_TOKEN = ("attention_mask", "mm_token_type_ids", "token_type_ids", "labels")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A shortened prompt.

    Attributes:
        kwargs: Arguments for the host's `forward` or `generate`.
        input_ids: The caller's ids, (B, L), None if embeddings were given.
        short_ids: The shortened ids, (B, M).
        index: Column of the caller's prompt of every column, (B, M).
        valid: Columns that are tokens, (B, M).
        length: Columns of the caller's prompt, L.
        next_position: Position of the first new token, (B, 1), or (axes, B, 1) where positions have axes.
        handover: What the trace has to know.
    """

    kwargs: dict[str, Any]
    input_ids: Tensor | None
    short_ids: Tensor | None
    index: Tensor
    valid: Tensor
    length: int
    next_position: Tensor
    handover: dict[str, Any]


def prepare(runtime: Runtime, kwargs: dict[str, Any], *, generating: bool = True) -> Packed | None:
    """Encode the pictures, compress their features and shorten the prompt; None if there are no pictures.

    Args:
        runtime: Of the plug-in.
        kwargs: Keyword arguments of `forward` or `generate`.
        generating: They are those of `generate`.
    """
    model, family = runtime.model, runtime.family
    if not any(kwargs.get(name) is not None for name in PIXELS.values()) and not kwargs.get("mm_encoder_outputs"):
        return None
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    masks = family.find_placeholders(model, ids, embeds)
    outputs, entries, full, blocks = _compressed(runtime, kwargs, masks)
    masks = {modality: mask for modality, mask in masks.items() if modality in outputs}
    prompt = find(masks, full, runs=family.images_are_runs)
    if "image" in entries:
        counts = [len(row) for row in prompt.images["image"]]
        runtime.pictures = Pictures(counts=counts, grids={}, blocks=blocks, entries=entries["image"])
    first = ids if ids is not None else embeds
    assert first is not None
    given = kwargs.get("attention_mask")
    real = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device) if given is None else given.bool()
    columns = build(prompt, real, None)
    keep, protect = real.clone(), torch.zeros_like(real)
    for modality, mask in masks.items():
        keep[mask] = torch.cat([entry.keep for entry in entries[modality]]).to(keep.device)
        protect[mask] = torch.cat([entry.protect for entry in entries[modality]]).to(keep.device)
    lengths: list[int] = keep.sum(1).tolist()
    reduction = pack(keep, max(lengths))
    index, valid = reduction.index, reduction.valid
    short = {name: take(kwargs[name], index) for name in PER_TOKEN if kwargs.get(name) is not None}
    short["attention_mask"] = valid.to(torch.int64 if given is None else given.dtype)
    for name, blank in (("labels", -100), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in short:
            short[name] = short[name].masked_fill(~valid, blank)
    positions = _positions(runtime, kwargs, index, valid, generating)
    rest = {k: v for k, v in kwargs.items() if k not in (*PIXELS.values(), *family.consumed, "position_ids")}
    new = rest | short | positions | {"mm_encoder_outputs": outputs}
    if ids is not None:
        new["input_ids"] = take(ids, index).masked_fill(~valid, _filler_id(runtime))
    if embeds is not None:
        new["inputs_embeds"] = take(embeds, index).masked_fill(~valid.unsqueeze(-1), 0)
    last = positions.get("position_ids")
    step = (valid.sum(1, keepdim=True) if last is None else following(last)).long()
    handover = {
        "before": columns.lengths,
        "before_sizes": columns.counts,
        "source": index,
        "protect": take(protect, index),
    }
    return Packed(
        kwargs=new,
        input_ids=ids,
        short_ids=new.get("input_ids"),
        index=index,
        valid=valid,
        length=real.shape[1],
        next_position=step,
        handover=handover,
    )


def _compressed(runtime: Runtime, kwargs: dict[str, Any], masks: dict[str, Tensor]) -> Encoded:
    """Encoder outputs with fewer tokens, the images one by one, and their full sizes."""
    method = runtime.method
    if isinstance(method, VisionMethod):  # it works inside the tower, else the prompt would not be shortened
        return encode_merged(runtime, kwargs, masks)
    assert isinstance(method, FeatureMethod)
    if "pixels" in method.needs:
        return downsampled(runtime, kwargs, masks)
    if isinstance(method, TrainedMethod):
        return compressed(runtime, kwargs, masks)
    return compress(runtime, kwargs, masks)


def _positions(
    runtime: Runtime, kwargs: dict[str, Any], index: Tensor, valid: Tensor, generating: bool
) -> dict[str, Tensor]:
    """Positions of the uncompressed prompt at the columns that stay; nothing where they are counted anew."""
    if runtime.method.renumber:
        return {}
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = runtime.family.positions(runtime.model, kwargs, generating=generating)
    if positions.ndim == 3:  # one row per axis
        return {"position_ids": torch.stack([take(axis.expand(len(index), -1), index) for axis in positions])}
    return {"position_ids": take(positions.expand(len(index), -1), index).masked_fill(~valid, 0)}


def _filler_id(runtime: Runtime) -> int:
    """An id for columns that are no tokens: the padding id, as long as it is no placeholder."""
    pad = getattr(runtime.text.config, "pad_token_id", None)
    taken = set(runtime.family.placeholders(runtime.model).values())
    return pad if isinstance(pad, int) and pad not in taken else min({0, 1, 2} - taken)


def following(positions: Tensor) -> Tensor:
    """Position of the next token, (B, 1) or (axes, B, 1): time, height and width go on together from their largest."""
    last = positions.amax(-1, keepdim=True)
    if last.ndim == 3:
        last = torch.cat([last[:-3], last[-3:].amax(0, keepdim=True).expand(3, -1, -1)])
    return last + 1


def put_back(packed: Packed, output: Any) -> Any:
    """Put the caller's own prompt back in front of the generated tokens."""
    if packed.input_ids is None or packed.short_ids is None:
        return output
    whole = output if isinstance(output, Tensor) else output.sequences
    repeats = len(whole) // len(packed.input_ids)
    prompt = packed.input_ids.repeat_interleave(repeats, dim=0).to(whole.device)
    restored = torch.cat([prompt, whole[:, packed.short_ids.shape[1] :]], dim=1)
    if isinstance(output, Tensor):
        return restored
    output.sequences = restored
    return output


def step(packed: Packed, kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """Arguments for new tokens alone on the cache of a shortened prompt, in a loop written by hand.

    Args:
        packed: The prompt the cache was made with.
        kwargs: What the caller gave.
        cache: The cache.
    """
    first = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    mask, whole = kwargs.get("attention_mask"), packed.length
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > whole:
        short_mask: Tensor = packed.kwargs["attention_mask"]
        kwargs = kwargs | {"attention_mask": torch.cat([short_mask, mask[:, whole:].to(short_mask.dtype)], dim=1)}
    if "position_ids" not in packed.kwargs or kwargs.get("position_ids") is not None:
        return kwargs
    done = int(cache.get_seq_length()) - packed.index.shape[1]
    steps = packed.next_position + done + torch.arange(first.shape[1], device=first.device)
    old: Tensor = packed.kwargs["position_ids"]
    return kwargs | {"position_ids": steps.expand(*old.shape[:-1], -1)}


def continue_prompt(packed: Packed, kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments for more tokens on the cache of a shortened prompt.

    Args:
        packed: The prompt the cache was made with.
        kwargs: What the caller gave: the whole history, or the new tokens alone.
        name: The method, for messages.

    Raises:
        ValueError: The prompt is not the one of this cache, or brings new pictures.
    """
    ids, old, short_ids = kwargs.get("input_ids"), packed.input_ids, packed.short_ids
    pictures = any(kwargs.get(key) is not None for key in PIXELS.values()) or kwargs.get("mm_encoder_outputs")
    lost = ValueError(
        f"This cache belongs to a prompt that {name} compressed. Go on with the same ids plus new text (no new "
        "pictures), as `sequences` returned them, or start with a fresh cache."
    )
    if pictures or ids is None or old is None or short_ids is None or len(ids) != len(old):
        raise lost
    if ids.shape[1] <= old.shape[1] or not torch.equal(ids[:, : old.shape[1]], old.to(ids.device)):
        raise lost
    new = ids[:, old.shape[1] :]
    mask = kwargs.get("attention_mask")
    tail = torch.ones_like(new) if mask is None else mask[:, old.shape[1] :]
    short = packed.kwargs
    changed = {
        "input_ids": torch.cat([short_ids, new], dim=1),
        "attention_mask": torch.cat([short["attention_mask"], tail.to(short["attention_mask"].dtype)], dim=1),
    }
    positions = short.get("position_ids")
    if positions is not None:
        steps = packed.next_position + torch.arange(new.shape[1], device=new.device)
        changed["position_ids"] = torch.cat([positions, steps.expand(*positions.shape[:-1], -1)], dim=-1)
    return {k: v for k, v in kwargs.items() if k not in (*PIXELS.values(), *PER_TOKEN)} | changed
