"""Pictures in folders, with captions beside them and classes from folder names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vistok.data.base import PictureFiles, Sample
from vistok.image import find_pictures, to_pil
from vistok.registry import register


@register("dataset", "folder")
class Folder(PictureFiles):
    """Picture files of folders (recursively), glob patterns or single paths, sorted within each.

    Args:
        path: A folder, pattern or file, or a list of these.
        captions: Read the caption of `x.jpg` from `x.txt` beside it; a picture without one has an empty caption.
        labels: Take the name of the folder that holds a picture as its class.
        exclude: File names without their endings that are left out.
        limit: Use only this many pictures, the first ones.

    Raises:
        FileNotFoundError: No pictures there.
        ValueError: Nothing is left after `exclude`, or `captions` without a single caption file.
    """

    def __init__(
        self,
        *,
        path: str | list[str],
        captions: bool = False,
        labels: bool = False,
        exclude: Sequence[str] = (),
        limit: int | None = None,
    ) -> None:
        sources = [path] if isinstance(path, str) else path
        found = [file for source in sources for file in find_pictures(Path(source).expanduser())]
        kept = [file for file in dict.fromkeys(found) if file.stem not in set(exclude)]
        self.files = kept[:limit]
        if not self.files:
            raise ValueError(f"No picture of {', '.join(sources)} is left: {len(found)} were found and all excluded.")
        self.captions = captions
        self.classes = sorted({file.parent.name for file in self.files}) if labels else []
        if captions and not any(file.with_suffix(".txt").is_file() for file in self.files):
            first = self.files[0].with_suffix(".txt")
            raise ValueError(f"captions is true, but no picture has a caption beside it (looked for {first}, ...).")

    def read(self, index: int) -> Sample:
        """Open one picture.

        Raises:
            PictureError: A damaged file.
            FileNotFoundError: It was there when the run began and is not any more.
        """
        file = self.files[index]
        label = self.classes.index(file.parent.name) if self.classes else None
        return Sample(picture=to_pil(file), text=self._caption(file) if self.captions else None, label=label)

    def _caption(self, file: Path) -> str:
        beside = file.with_suffix(".txt")
        return beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else ""
