"""Write the conversations of a LLaVA data file beside its pictures, for `data: {name: folder, captions: true}`.

    python recipes/vlm/conversations.py FILE.json PICTURES

FILE.json lists `{"image": path below PICTURES, "conversations": [{"from": "human" or "gpt", "value": ...}, ...]}`
as LLaVA-Pretrain and the LLaVA-1.5 mix are. PICTURES/a/b.jpg gets PICTURES/a/b.txt, one `question<tab>answer` a line.
Samples without a picture, and those whose picture is not there, are left out and counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def lines(turns: Sequence[dict[str, str]]) -> list[str]:
    """Questions and answers of a conversation; the mark of the picture and line breaks are taken out."""
    said = [" ".join(turn["value"].replace("<image>", " ").split()) for turn in turns]
    return [f"{question}\t{answer}" for question, answer in zip(said[::2], said[1::2])]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("pictures", type=Path)
    args = parser.parse_args()
    written, left_out = 0, 0
    for sample in json.loads(args.file.read_text(encoding="utf-8")):
        picture = args.pictures / sample.get("image", "")
        found = lines(sample["conversations"])
        if not (picture.is_file() and found):
            left_out += 1
            continue
        picture.with_suffix(".txt").write_text("\n".join(found), encoding="utf-8")
        written += 1
    print(f"{written} conversations beside their pictures, {left_out} samples left out")


if __name__ == "__main__":
    main()
