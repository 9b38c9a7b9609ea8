"""Pictures that were turned into tokens by `vistok tokenize`, for training generators."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vistok.data import manifest
from vistok.data.base import TokenRows, TokenSample
from vistok.data.token_shards import Layout, Shard, open_shard
from vistok.registry import register
from vistok.tokens import Tokens


@register("dataset", "ids")
class Ids:
    """Shards of ids (or codes), read by random access and memory map.

    A sample is one picture. Nothing is read to get to a position, so training continues anywhere at once; which view of
    a picture is taken is drawn per position, like a crop. `crop`, `flip` and the like of the loader do not apply: crops
    and mirror images were made with the tokens.

    Args:
        path: Folder that `vistok tokenize` wrote.
        views: Of pictures with several views: `random`, one is drawn whenever the picture is read; `all`, each is a
            sample of its own; `first`, only the first.
        model_id: The model id of the tokenizer that is to decode them (`tokenizer.model_id`); others are refused. null
            takes any.
        verify: Compare every shard with its checksum first.

    Attributes:
        manifest: What the folder says of itself.
        layout: How tokens are stored.
        fingerprint: 16 hex digits over the checksums of all shards.

    Raises:
        ManifestError: No folder of tokens, an unfinished or damaged one, or tokens of another tokenizer.
    """

    def __init__(
        self,
        *,
        path: Path,
        views: Literal["random", "all", "first"] = "random",
        model_id: str | None = None,
        verify: bool = False,
    ) -> None:
        folder = Path(path).expanduser()
        self.manifest = manifest.read(folder)
        shards = manifest.shards_of(self.manifest, folder)
        maker = self.manifest["identity"]["tokenizer"]
        if model_id is not None and model_id != maker["model_id"]:
            raise manifest.ManifestError(
                f"{folder} holds tokens of {maker['name']} {maker['model_id']}; the tokenizer given is {model_id}. "
                "Turn the pictures into tokens with that one."
            )
        if verify:
            manifest.refuse(shard.problem(folder, contents=True) for shard in shards)
        self.views = views
        self.layout = Layout.from_dict(self.manifest["layout"])
        self.form = self.manifest["identity"]["shards"]["format"]
        held = [shard for shard in shards if shard.samples]
        self.paths = [folder / shard.file for shard in held]
        self.ends = np.cumsum([shard.samples for shard in held])
        digest = hashlib.sha256("".join(shard.sha256 for shard in held).encode()).hexdigest()
        self.fingerprint = f"{digest[:16]}-{views}"
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        """Number of pictures; of views with `views: all`."""
        return int(self.ends[-1]) * (self.layout.views if self.views == "all" else 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process opens files of its own

    def name(self, index: int) -> str:
        """What the picture was called in its data set, and the view where each is a sample."""
        picture, view = self._place(index, 0)
        shard, row = self._find(picture)
        return f"{shard.key(row)}#{view}" if self.views == "all" else shard.key(row)

    def read(self, index: int) -> TokenSample:
        """One picture's tokens: a row for each view; one row with `views: all` or `first`.

        Raises:
            ShardError: A damaged shard.
        """
        picture, view = self._place(index, 0)
        shard, row = self._find(picture)
        chosen = slice(None) if self.views == "random" else slice(view, view + 1)
        values, text = shard.values(row)[chosen], shard.text(row)
        captions = None if text is None else (text,) * len(values)
        tokens = self.layout.tokens_of(values, shard.lengths(row)[chosen], captions)
        return TokenSample(tokens=tokens, key=shard.key(row), text=text, label=shard.label(row))

    def gather(self, indices: Sequence[int], draws: Sequence[int], positions: np.ndarray) -> TokenRows:
        """Samples of a batch, see `TokenDataset`.

        Raises:
            ShardError: A damaged shard.
        """
        values, lengths, text, labels = [], [], [], []
        for index, draw in zip(indices, draws):
            picture, view = self._place(index, draw)
            shard, row = self._find(picture)
            values.append(shard.values(row)[view])
            lengths.append(shard.lengths(row)[view])
            text.append(shard.text(row))
            labels.append(shard.label(row))
        return TokenRows(
            values=torch.stack(values),
            lengths=torch.stack(lengths),
            positions=positions,
            text=None if text[0] is None else tuple(t or "" for t in text),
            labels=None if labels[0] is None else np.array(labels),
        )

    def tokens_of(self, rows: TokenRows) -> Tokens:
        """Rows as tokens that the tokenizer decodes."""
        return self.layout.tokens_of(rows.values, rows.lengths, rows.text)

    def _place(self, index: int, draw: int) -> tuple[int, int]:
        """Picture and view of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} samples, number {index} was asked for.")
        if self.views == "all":
            return divmod(index, self.layout.views)
        return index, draw % self.layout.views if self.views == "random" else 0

    def _find(self, picture: int) -> tuple[Shard, int]:
        """The shard of a picture, opened at the first use, and the row in it."""
        number = int(np.searchsorted(self.ends, picture, side="right"))
        if number not in self._open:
            self._open[number] = open_shard(self.paths[number], self.layout, self.form)
        return self._open[number], picture - (int(self.ends[number - 1]) if number else 0)
