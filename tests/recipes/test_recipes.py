"""Every recipe in the repository is complete and fits its schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from vistok.config import read_yaml
from vistok.train.recipe import flatten, from_dict, load

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def filled(path: Path) -> list[str]:
    """Overrides that give every open value something."""
    return [f"{key}=given" for key, value in flatten(read_yaml(path)) if value == "???"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_recipe_fits_its_schema(path):
    recipe = load(path, filled(path))
    assert from_dict(recipe.resolved()).resolved() == recipe.resolved()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_header_gives_the_command(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"recipes/{path.relative_to(FOLDER)}" in line for line in head)


def test_no_two_recipes_write_to_the_same_folder():
    outs = [read_yaml(path)["train"]["out"] for path in RECIPES]
    assert sorted(outs) == sorted(set(outs))
