"""The README tells the truth: its tables are those of the registry, its examples run.

`python -m tests.test_readme` writes the tables anew.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vistok
from tests.plugins import hosts, local
from vistok.cli import run

REPOSITORY = Path(__file__).parents[1]
PAGES = ("README.md", "recipes/README.md", "assets/methods.md", "assets/protocols.md")
TABLE = re.compile(
    r"<!-- (?P<what>vistok list [^\n]*?|recipes|tiny results) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL
)


def recipes() -> str:
    """Every recipe with the first line of its header."""
    folder = REPOSITORY / "recipes"
    rows = ["| recipe | what it is |", "| --- | --- |"]
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).as_posix()
        rows.append(f"| [{name}]({name}) | {path.read_text().splitlines()[0].lstrip('# ')} |")
    return "\n".join(rows) + "\n"


def tiny_results() -> str:
    """The comparison of the small recipes, from the stored results."""
    from recipes.compare_tiny import stored, table

    return table(stored())


def printed(command: str) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(shlex.split(command)[1:]) == 0
    return out.getvalue()


def filled(page: str) -> str:
    """A page with its tables as they are now."""

    def table(match: re.Match[str]) -> str:
        what = match["what"]
        made = recipes() if what == "recipes" else tiny_results() if what == "tiny results" else printed(what)
        return f"<!-- {what} -->\n{made}<!-- end -->"

    return TABLE.sub(table, page)


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_registry(name: str) -> None:
    page = (REPOSITORY / name).read_text()
    assert TABLE.search(page)
    assert page == filled(page), "run: python -m tests.test_readme"


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_to_files(name: str) -> None:
    path = REPOSITORY / name
    links = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's paths exist; the trained models in it are tiny and random."""
    for name in ("runs/quickstart/tokenizer", "runs/mine/tokenizer"):
        vistok.create("tokenizer", "titok_tiny").eval().save_pretrained(tmp_path / name)
    for name in ("photo.jpg", "other.png"):
        Image.new("RGB", (80, 60)).save(tmp_path / name)
    local.save(tmp_path / "runs" / "llava")
    (tmp_path / "vistok").symlink_to(REPOSITORY / "vistok")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("workplace")
def test_the_commands_run(capsys: Any) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("vistok ")]
    quick = [command for command in commands if not command.startswith("vistok train ")]
    assert len(quick) >= 4
    for command in quick:
        assert run(shlex.split(command)[1:]) == 0, capsys.readouterr().err


@pytest.mark.usefixtures("workplace")
def test_the_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    load = vistok.load
    local = "runs/quickstart/tokenizer"  # stands in for the hub
    monkeypatch.setattr(vistok, "load", lambda source: load(source if Path(source).exists() else local))
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"model": hosts.llava(), "inputs": hosts.llava_inputs()})


def test_recipes_that_are_named_exist() -> None:
    named = {r for name in PAGES for r in re.findall(r"recipes/[\w/]+\.yaml", (REPOSITORY / name).read_text())}
    assert {r for r in named if not (REPOSITORY / r).is_file()} == set()


def test_the_contact_sheet_shows_the_bundled_photographs(photos: list[Path]) -> None:
    from assets.contact_sheet import contact_sheet

    drawn = contact_sheet(photos)
    with Image.open(REPOSITORY / "assets" / "photos.jpg") as stored:
        assert stored.size == drawn.size
        small = [list(p.convert("L").resize((42, 36)).tobytes()) for p in (stored, drawn)]
    assert max(abs(a - b) for a, b in zip(*small)) <= 8


if __name__ == "__main__":
    for page_name in PAGES:
        target = REPOSITORY / page_name
        target.write_text(filled(target.read_text()))
