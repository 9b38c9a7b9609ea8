"""SEED's text branch: captions through the self-attention of the causal Q-Former, for training stage I."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vistok.hub import LoadError
from vistok.layers.qformer import QFormer

Tokenise = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TextBranchSize:
    """What reads captions beside a SEED in stage I; its defaults are the published values.

    Attributes:
        kind: `bert` (the tokenizer of transformers behind `model`, with [DEC] added), or `words`: every word is the
            hash of its letters, which needs no files and is meant for tests and small recipes.
        model: For `bert` a folder or a hub id.
        vocabulary: Rows of the word table.
        positions: Rows of the position table.
        length: Text tokens, L; captions are cut or padded to it.
        dim: Channels in which pictures and texts are compared.
        dropout: BERT's, in training, of texts and queries.
    """

    kind: Literal["bert", "words"] = "bert"
    model: str = "bert-base-uncased"
    vocabulary: int = 30523
    positions: int = 512
    length: int = 32
    dim: int = 256
    dropout: float = 0.1


class FeedForward(nn.Module):
    """The text's own MLP of a Q-Former layer, with residual and layer norm."""

    def __init__(self, dim: int, *, eps: float, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        out: Tensor = self.norm(x + F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training))
        return out


class TextBranch(nn.Module):
    """The text half of a Q-Former in BERT's form (arXiv 2301.12597, section 3.1), and what compares it with pictures.

    Texts share the queries' self-attention and the first layer norm; word and position tables and MLPs are their own.
    They see themselves in both directions and no picture. Not needed once stage I is over.

    Args:
        spec: Tokenizer and sizes.
        width: Width of the Q-Former, D.
        depth: Its layers.
        eps: Epsilon of its layer norms.

    Attributes:
        temperature: Learned divisor of similarities, (1,).

    Raises:
        ValueError: More text tokens than positions, or no room for a word between the first and the last.
    """

    def __init__(self, spec: TextBranchSize, width: int, depth: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        if not 3 <= spec.length <= spec.positions:
            raise ValueError(
                f"model.text_branch.length is 3..{spec.positions} (its positions), with the first and the last token; "
                f"got {spec.length}."
            )
        if spec.vocabulary < 4:
            raise ValueError(f"model.text_branch.vocabulary is at least 4, got {spec.vocabulary}.")
        self.spec = spec
        self.words = nn.Embedding(spec.vocabulary, width)
        self.positions = nn.Embedding(spec.positions, width)
        self.layers = nn.ModuleList(FeedForward(width, eps=eps, dropout=spec.dropout) for _ in range(depth))
        self.proj = nn.Linear(width, spec.dim)
        self.picture_proj = nn.Linear(width, spec.dim)
        self.temperature = nn.Parameter(torch.full((1,), 0.07))  # FSDP cuts no scalars
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self._tokenise: Tokenise | None = None

    def tokenise(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> ids int64 (B, L) and which of them are no padding, bool (B, L).

        Captions are cleaned as BLIP-2's are for training: small letters, most punctuation out, at most 50 words.

        Raises:
            LoadError: The tokenizer cannot be had, or has more tokens than the word table.
        """
        if self._tokenise is None:
            self._tokenise = _words(self.spec) if self.spec.kind == "words" else _bert(self.spec)
        return self._tokenise([clean(caption) for caption in captions])

    def forward(self, qformer: QFormer, captions: Sequence[str]) -> Tensor:
        """Captions -> features of length 1 of their first tokens, float32, (B, dim)."""
        device = self.words.weight.device
        ids, mask = (x.to(device) for x in self.tokenise(captions))
        x = qformer.norm(self.words(ids) + self.positions.weight[: ids.shape[1]])
        x = F.dropout(x, self.spec.dropout, self.training)
        for layer, own in zip(qformer.layers, self.layers):
            x = layer(x, None, mask=mask, feed_forward=own)
        return F.normalize(self.proj(x[:, 0]).float(), dim=-1)

    def pictures(self, causal: Tensor) -> Tensor:
        """Causal embeddings (B, N, D) -> features of length 1 of the last ones, float32, (B, dim)."""
        return F.normalize(self.picture_proj(causal[:, -1]).float(), dim=-1)


def clean(caption: str) -> str:
    """A caption as LAVIS' `blip_caption` prepares it."""
    found = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    return " ".join(re.sub(r"\s{2,}", " ", found).strip(" \n").split(" ")[:50])


def _bert(spec: TextBranchSize) -> Tokenise:
    """[CLS] words [SEP] by a BERT tokenizer from a folder or the hub."""
    try:
        from transformers import BertTokenizer

        tokenizer: Any = BertTokenizer.from_pretrained(spec.model)
    except ImportError as err:
        raise LoadError(f"The text branch needs a package: pip install transformers. ({err})") from err
    except Exception as err:  # transformers raises many types for what is absent, damaged or unreachable
        reason = " ".join(str(err).split())[:300]
        raise LoadError(
            f"The BERT tokenizer {spec.model!r} cannot be loaded: {reason} Set model.text_branch.model to a folder "
            "with its files, or model.text_branch.kind=words."
        ) from err
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    if len(tokenizer) > spec.vocabulary:
        raise LoadError(
            f"The BERT tokenizer {spec.model!r} has {len(tokenizer)} tokens with [DEC] and the word table "
            f"{spec.vocabulary} rows. Set model.text_branch.vocabulary={len(tokenizer)}."
        )

    def tokenise(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=spec.length, return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"].bool()

    return tokenise


def _words(spec: TextBranchSize) -> Tokenise:
    """Padding is 0, the first token 1, the last 2; words are hashed onto the rest."""

    def tokenise(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(captions), spec.length, dtype=torch.int64)
        for row, caption in zip(ids, captions):
            words = re.findall(r"\w+", caption)[: spec.length - 2]
            found = [1, *(3 + zlib.crc32(word.encode()) % (spec.vocabulary - 3) for word in words), 2]
            row[: len(found)] = torch.tensor(found)
        return ids, ids != 0

    return tokenise
