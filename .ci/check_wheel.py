"""Check that a wheel holds what has to be installed, and nothing that must not be.

python .ci/check_wheel.py WHEEL
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path


def problems(wheel: Path) -> list[str]:
    """What is missing or too much, in words."""
    names = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files", "vistok"], capture_output=True, text=True, check=True).stdout
    tracked = {line for line in listed.splitlines() if line}
    inside = {name for name in names if name.startswith("vistok/")}
    found = []
    if missing := sorted(tracked - inside):
        found.append(f"missing: {', '.join(missing[:8])}")
    if extra := sorted(inside - tracked):
        found.append(f"not in the repository: {', '.join(extra[:8])}")
    if stray := sorted(n for n in names - inside if ".dist-info/" not in n):
        found.append(f"outside the package: {', '.join(stray[:8])}")
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        found.append("no licence")
    photos = sum(name.startswith("vistok/data/photos/") and name.endswith(".jpg") for name in inside)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(inside)} files, {photos} photographs")
    return found


if __name__ == "__main__":
    if wrong := problems(Path(sys.argv[1])):
        sys.exit(f"{sys.argv[1]}: " + "; ".join(wrong))
