"""Make assets/rate_distortion.{html,png,json}: the shipped tokenizer beside JPEG, WebP and AVIF at equal bytes.

Run at the top of the repository: python assets/rate_distortion.py [DATA]

DATA is where the 24 held-out pictures are or will be (`data` by default): `recipes/get_data.py --set heldout DATA`
fetches them if they are not there. LPIPS (vgg), DISTS and EfficientNet need the packages that `.ci/run` installs;
without them those columns are left out, by name.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MODEL = "spectral_planes_128.free"
WORK = Path("runs/rate_distortion")
KEPT = {
    "rate_distortion.html": "rate_distortion.html",
    "rate_distortion.json": "rate_distortion.json",
    "curves.png": "rate_distortion.png",
}
LARGEST = 700_000
"""Bytes of the page, at most."""


def make(data: Path, out: Path) -> None:
    """Measure and put the three files into `out`.

    Raises:
        RuntimeError: The page is larger than the repository wants it.
    """
    pictures = data / "heldout"
    if not pictures.is_dir():
        fetch = [sys.executable, str(HERE.parent / "recipes" / "get_data.py"), "--set", "heldout", str(data)]
        subprocess.run(fetch, check=True)
    command = ["eval", MODEL, "--rate-distortion", "--data", str(pictures), "--out", str(WORK), "--overwrite"]
    subprocess.run([sys.executable, "-m", "vistok", *command], check=True)
    size = (WORK / "rate_distortion.html").stat().st_size
    if size > LARGEST:
        raise RuntimeError(f"The page has {size} bytes, more than {LARGEST}.")
    for name, kept in KEPT.items():
        shutil.copyfile(WORK / name, out / kept)


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "data"), HERE)
