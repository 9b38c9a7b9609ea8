"""Hugging Face data sets that lie on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistok.data.base import Sample
from vistok.image import decode, to_pil
from vistok.registry import nearest, register

STORED = ("string", "large_string", "binary", "large_binary")  # paths, or files as bytes
SAVE = "Save one with datasets.load_dataset(...).save_to_disk(FOLDER)"


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
        FileNotFoundError: No such folder.
        ValueError: It holds no data set, or not this split or column.
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

        if not path.is_dir():
            raise FileNotFoundError(f"There is no folder {str(path)!r}. Data sets are read from disk. {SAVE}.")
        try:
            found: Any = datasets.load_from_disk(str(path))
        except Exception as err:  # datasets and pyarrow raise many types
            reason = " ".join(str(err).split())
            raise ValueError(f"{path} holds no data set that can be read: {reason.rstrip('.')}. {SAVE}.") from err
        if isinstance(found, dict):
            if split is None or split not in found:
                raise ValueError(f"{path} has splits: give one as `split`, got {split!r}. {nearest(str(split), found)}")
            found = found[split]
        for column in filter(None, (image, caption, label)):
            if column not in found.column_names:
                raise ValueError(f"{path} has no column {column!r}. {nearest(column, found.column_names)}")
        kind = found.features[image]
        if isinstance(kind, datasets.Image):
            found = found.cast_column(image, datasets.Image(decode=False))
        elif getattr(kind, "dtype", "") not in STORED:
            raise ValueError(
                f"Column {image!r} of {path} holds {getattr(kind, 'dtype', kind)}, no pictures. "
                "Name the column of the pictures as `image`."
            )
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
