"""The photographs that come with the package (sources and licences: `photos/ATTRIBUTION.md`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from vistok.data.base import PictureFiles, Sample
from vistok.image import to_pil
from vistok.registry import register

FOLDER = Path(__file__).parent / "photos"
HELD_OUT: tuple[str, ...] = (
    "01-cat",
    "02-coffee",
    "09-pagoda",
    "10-dahlia",
    "15-living-room",
    "16-fig",
    "20-dogs",
    "39-painting-reading",
)
"""Whole photographs no training run sees."""


@register("dataset", "photos")
class Photos(PictureFiles):
    """The 42 bundled photographs, 256 pixels on the short side; 8 of them are held out.

    Args:
        split: `train` (34 pictures), `heldout` (8) or `all`.
        captions: Give the caption of each picture.
        permissive: Leave out the pictures under a share-alike licence.
    """

    def __init__(
        self, *, split: Literal["train", "heldout", "all"] = "train", captions: bool = False, permissive: bool = False
    ) -> None:
        rows = [json.loads(line) for line in (FOLDER / "index.jsonl").read_text(encoding="utf-8").splitlines()]
        self.rows: list[dict[str, Any]] = [row for row in rows if _wanted(row, split, permissive)]
        self.files = [FOLDER / row["file"] for row in self.rows]
        self.captions = captions

    def name(self, index: int) -> str:
        """The file's name."""
        return self.files[index].name

    def read(self, index: int) -> Sample:
        """Open one picture."""
        text = self.rows[index]["caption"] if self.captions else None
        return Sample(picture=to_pil(self.files[index]), text=text)


def _wanted(row: dict[str, Any], split: str, permissive: bool) -> bool:
    held = Path(row["file"]).stem in HELD_OUT
    in_split = split == "all" or held == (split == "heldout")
    return in_split and not (permissive and row["share_alike"])
