"""Fixtures for all tests: golden files, photographs, no network."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VISTOK_CACHE", tempfile.mkdtemp(prefix="vistok-tests-"))  # nobody's own cache
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: several runs share few cores

import numpy as np
import pytest
import torch
from PIL import ImageFile

HERE = Path(__file__).parent
PHOTOS = HERE.parent / "vistok" / "data" / "photos"


@dataclass(frozen=True)
class Golden:
    """One golden file: its JSON `meta` and its arrays as tensors (integers as int64)."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> torch.Tensor:
        found = torch.from_numpy(np.array(self.arrays[key]))
        return found if found.is_floating_point() or found.dtype == torch.bool else found.long()

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def state_dict(self) -> dict[str, torch.Tensor]:
        """An official checkpoint with the golden weights: names and shapes from the file, values from `fill`."""
        from tests.fill import fill

        return {k: torch.from_numpy(np.asarray(fill(k, tuple(s)))) for k, s in self.meta["state_dict"]}


@pytest.fixture(autouse=True)
def cut_off_pictures_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own setting; lmms-eval changes it for the whole process when it is imported."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Loads `tests/golden/NAME.npz`."""

    def load(name: str) -> Golden:
        with np.load(HERE / "golden" / f"{name}.npz") as file:
            arrays = {k: file[k] for k in file.files}
        return Golden(meta=json.loads(str(arrays.pop("meta"))), arrays=arrays)

    return load


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """The bundled photographs, sorted."""
    return sorted(PHOTOS.glob("*.jpg"))


@pytest.fixture
def scratch_registry() -> Iterator[None]:
    """Lets a test register what it likes: every table is put back afterwards."""
    from vistok.registry import KINDS, registry

    for kind in KINDS:
        registry(kind).fill()
    before = {k: (dict(registry(k).builders), dict(registry(k).presets)) for k in KINDS}
    yield
    for kind, (builders, presets) in before.items():
        registry(kind).builders, registry(kind).presets = builders, presets


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
