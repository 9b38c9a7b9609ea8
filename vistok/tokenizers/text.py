"""Captions: how they are given to a tokenizer that reads text, and what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.tokenizers.text_encoders import TextEncoder, Texts


def one_per_picture(text: Any, batch: int) -> tuple[str, ...] | Tensor | None:
    """Captions as users give them, checked: one string per picture, or features.

    Args:
        text: A caption for all pictures, a list of one per picture (None in it stands for the empty caption), features
            of a text encoder (B, L, D), or None.
        batch: Number of pictures, B.

    Raises:
        ValueError: Another number of captions than pictures.
        TypeError: Something else.
    """
    if text is None:
        return None
    if isinstance(text, str):
        return (text,) * batch
    if isinstance(text, Tensor):
        if text.ndim != 3 or len(text) != batch or not text.is_floating_point():
            raise ValueError(
                f"Text features are floating-point ({batch}, L, D), one row of tokens per picture, got {text.dtype} "
                f"{tuple(text.shape)}."
            )
        return text
    if not isinstance(text, (list, tuple)) or not all(t is None or isinstance(t, str) for t in text):
        raise TypeError(f"text is a caption, a list of captions, or features (B, L, D), got {text!r:.80}.")
    if len(text) != batch:
        raise ValueError(f"There are {batch} pictures and {len(text)} captions; give one caption per picture.")
    return tuple(t or "" for t in text)


def captions_of(options: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The captions among a tokenizer's options, to go along with its tokens; features do not."""
    text = options.get("text")
    return text if isinstance(text, tuple) else None


class ReadsText:
    """For tokenizers with `text` among their options: captions or features to features.

    Without captions the empty one stands for all pictures (the null text).

    Attributes:
        texts: The frozen text encoder with its cache; loaded at the first caption.
    """

    texts: Texts

    def read_text_with(self, encoder: TextEncoder | Mapping[str, Any]) -> TextEncoder:
        """Set the text encoder; its specification."""
        spec = encoder if isinstance(encoder, TextEncoder) else TextEncoder(**encoder)
        self.texts = Texts(spec)
        return spec

    def text_features(self, text: tuple[str, ...] | Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Features of a batch's captions, float, (B, L, D).

        Raises:
            ValueError: Features of another width, or of more tokens than there are positions.
            LoadError: Captions, and the text encoder cannot be loaded.
        """
        if not isinstance(text, Tensor):
            return self.texts(text or ("",) * batch, device)
        spec = self.texts.spec
        if text.shape[2] != spec.dim or text.shape[1] != spec.length:
            raise ValueError(
                f"Text features are (B, {spec.length}, {spec.dim}) for this tokenizer, got {tuple(text.shape)}."
            )
        return text.to(device)
