"""What is installed: every package, every data file, every dependency."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vistok
from tests.test_imports import MODULES, PACKAGE, imports, module_id

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

REPOSITORY = PACKAGE.parent
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
LARGEST = 1_000_000  # bytes of a file in the repository; shipped weights are the exception

DISTRIBUTION = {"PIL": "pillow", "open_clip": "open_clip_torch", "torch_fidelity": "torch-fidelity"}
"""Import name -> distribution where they differ."""
BROUGHT = {"yaml": "omegaconf", "psutil": "accelerate"}
"""Import name -> the declared distribution that cannot be installed without it."""


def tracked() -> list[Path]:
    """Files that git knows, or all files of the package where there is no git."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return [p for name in done.stdout.split("\0") if name and (p := REPOSITORY / name).is_file()]


def declared() -> set[str]:
    """Distributions named by the project, extras included, normalised."""
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {re.split(r"[\[<>=~! ]", line)[0].lower().replace("_", "-") for group in groups for line in group}


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_every_import_is_declared(path: Path) -> None:
    heads = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    foreign = heads - set(sys.stdlib_module_names) - {"vistok"}
    names = DISTRIBUTION | BROUGHT
    assert {names.get(n, n).lower().replace("_", "-") for n in foreign} <= declared()


def test_every_folder_with_modules_is_a_package() -> None:
    assert {p.parent for p in MODULES} - {p.parent for p in MODULES if p.name == "__init__.py"} == set()


def test_every_data_file_of_the_package_is_packed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["vistok"]
    inside = [p.relative_to(PACKAGE).as_posix() for p in tracked() if p.is_relative_to(PACKAGE) and p.suffix != ".py"]
    assert {"py.typed", "data/photos/index.jsonl", "data/photos/ATTRIBUTION.md", "weights/NOTICE.md"} <= set(inside)
    assert [name for name in inside if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


def test_only_weights_are_large() -> None:
    large = [p for p in tracked() if p.stat().st_size > LARGEST and not p.is_relative_to(PACKAGE / "weights")]
    assert large == []


def test_the_version_is_the_same_everywhere() -> None:
    assert vistok.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("vistok")


def test_the_command_is_the_cli() -> None:
    points = importlib.metadata.entry_points(group="console_scripts", name="vistok")
    assert {point.value for point in points} == {"vistok.cli:main"}


def test_the_licence_is_apache_2() -> None:
    text = (REPOSITORY / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_bundled_photograph_is_attributed(photos: list[Path]) -> None:
    attribution = (PACKAGE / "data" / "photos" / "ATTRIBUTION.md").read_text()
    assert [p.name for p in photos if f"| {p.name} |" not in attribution] == []
    assert len(photos) == 42
