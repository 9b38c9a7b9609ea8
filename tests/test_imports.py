"""The house: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vistok

PACKAGE = Path(__file__).parents[1] / "vistok"
GROUND = frozenset(
    {"registry", "config", "image", "tokens", "vocabulary", "assets", "hub", "unpickle", "distributed"}
    & {p.stem for p in PACKAGE.glob("*.py")}
)
HOUSE = {"layers": GROUND}
HOUSE["flow"] = HOUSE["quantizers"] = HOUSE["compress"] = HOUSE["losses"] = GROUND | {"layers"}
HOUSE["codec"] = GROUND
HOUSE["tokenizers"] = HOUSE["quantizers"] | {"flow", "quantizers", "codec"}
HOUSE["generators"] = HOUSE["tokenizers"] | {"tokenizers"}
HOUSE["plugins"] = HOUSE["compress"] | {"compress"}
HOUSE["data"] = GROUND
HOUSE["tokenize"] = HOUSE["tokenizers"] | {"tokenizers", "data"}
HOUSE["evaluate"] = HOUSE["generators"] | {"generators", "plugins", "compress", "losses", "data", "tokenize"}
HOUSE["train"] = HOUSE["evaluate"] | {"evaluate"}
HOUSE["demo"] = HOUSE["evaluate"] | {"evaluate"}
HOUSE["cli"] = HOUSE["train"] | {"train", "demo"}
HOUSE["__main__"] = frozenset({"cli"})
HOUSE["__init__"] = GROUND | {"tokenizers", "plugins"}  # the public names, loaded when they are used
HOUSE |= {room: GROUND for room in GROUND}
HOUSE["registry"] = frozenset()

LIGHT = frozenset({"torch", "numpy"})
"""What a module may import at its top besides the standard library and vistok."""
TERMINAL = frozenset({"typer", "rich"})
WITHOUT_TORCH = ("__init__", "__main__", "registry", "config", "cli")
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room a file is in: its folder below the package, or its own name at the top."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names of everything a module imports; with `top_only` what runs when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif top_only and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_typing(node)):
            continue
        else:
            yield from imports(node, top_only=top_only)


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def rooms_imported(path: Path) -> set[str]:
    """Rooms of ours that a module imports anywhere, function bodies and type hints included."""
    names = (name.split(".") for name in imports(ast.parse(path.read_text())))
    ours = {parts[1] if len(parts) > 1 else "__init__" for parts in names if parts[0] == "vistok"}
    public = {n for n in ours if not (PACKAGE / n).is_dir() and not (PACKAGE / f"{n}.py").is_file()}
    return (ours - public) | ({"__init__"} if public else set())  # `from vistok import create` is the package itself


def module_id(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_arrows_go_one_way(path: Path) -> None:
    room = room_of(path)
    allowed = (
        HOUSE[room] | {room} | ({"__init__"} if room in ("train", "evaluate", "demo", "cli", "__main__") else set())
    )
    assert rooms_imported(path) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_the_top_of_a_module_imports_only_what_is_light(path: Path) -> None:
    tree = ast.parse(path.read_text())
    heads = {name.split(".")[0] for name in imports(tree, top_only=True)}
    foreign = heads - set(sys.stdlib_module_names) - {"vistok"}
    room = room_of(path)
    allowed = TERMINAL if room == "cli" else LIGHT
    assert foreign <= (allowed - LIGHT if room in WITHOUT_TORCH else allowed)


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_every_module_postpones_its_annotations(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body[1:] or "__future__.annotations" in set(imports(tree, top_only=True))


def after(code: str) -> set[str]:
    """Top-level packages that are loaded after running a line of Python."""
    line = f"import warnings; warnings.simplefilter('ignore'); {code}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=120, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_import_vistok_imports_nothing_foreign() -> None:
    foreign = after("import vistok") - after("pass") - set(sys.stdlib_module_names) - {"vistok"}
    assert foreign <= {"__editable___vistok_0_1_0_finder"}


def test_a_quantizer_costs_no_compiler() -> None:
    code = "import sys, torch, vistok; vistok.create('quantizer', 'vq', codebook_size=8, dim=4)(torch.randn(1, 2, 4))"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch._dynamo' not in sys.modules"], check=True)


def test_filling_the_registry_imports_no_large_library() -> None:
    large = {
        "timm",
        "diffusers",
        "open_clip",
        "transformers",
        "torchvision",
        "matplotlib",
        "accelerate",
        "PIL",
        "lmms_eval",
    }
    assert after("import vistok; vistok.list()") & large == set()


@pytest.mark.parametrize("name", vistok.__all__)
def test_public_names_are_found_when_they_are_used(name: str) -> None:
    assert getattr(vistok, name) is not None
    assert name in dir(vistok)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vistok' has no attribute 'tokenise'"):
        _ = vistok.tokenise
