"""Hugging Face data sets that lie on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistok.data.base import Sample, decode
from vistok.image import to_pil
from vistok.registry import nearest, register


@register("dataset", "hf")
class HuggingFace:
    """A data set written by `datasets.Dataset.save_to_disk`.

    Args:
        path: Its folder.
        split: Split, if the folder holds several.
        image: Column of the pictures.
        caption: Column of the captions; null for none.
        label: Column of the class indices; null for none.

    Raises:
        ImportError: The package `datasets` is not installed.
        FileNotFoundError: No data set there.
        ValueError: No such split or column.
    """

    def __init__(
        self,
        *,
        path: Path,
        split: str | None = None,
        image: str = "image",
        caption: str | None = None,
        label: str | None = None,
    ) -> None:
        try:
            import datasets
        except ImportError as err:
            raise ImportError("data.name=hf needs the package datasets: pip install datasets") from err

        found: Any = datasets.load_from_disk(str(path))
        if isinstance(found, dict):
            if split is None or split not in found:
                raise ValueError(f"data.split: {path} has splits, got {split!r}. {nearest(str(split), found)}")
            found = found[split]
        for column in filter(None, (image, caption, label)):
            if column not in found.column_names:
                raise ValueError(f"{path} has no column {column!r}. {nearest(column, found.column_names)}")
        if isinstance(found.features[image], datasets.Image):
            found = found.cast_column(image, datasets.Image(decode=False))
        self.table, self.image, self.caption, self.label = found, image, caption, label
        self.path = path

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def name(self, index: int) -> str:
        """Folder and row."""
        return f"{self.path}[{index}]"

    def read(self, index: int) -> Sample:
        """Read one row.

        Raises:
            PictureError: A damaged picture.
        """
        row = self.table[index]
        stored = row[self.image]
        if isinstance(stored, dict):
            data, file = stored.get("bytes"), stored.get("path")
            picture = decode(data, self.name(index)) if data is not None else to_pil(file)
        else:
            picture = decode(stored, self.name(index)) if isinstance(stored, bytes) else to_pil(stored)
        text = None if self.caption is None else str(row[self.caption] or "")
        return Sample(picture=picture, text=text, label=None if self.label is None else int(row[self.label]))
