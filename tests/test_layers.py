"""The plan of the house: a module imports from lower layers or its own folder, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distill"
LAYERS = (
    {"core"},
    {"losses", "pruning", "quantization"},
    {"models", "data"},
    {"training", "evaluation", "exporters", "tracking"},
    {"stages"},
    {"recipe", "recipes", "launch"},
    {"runner", "listing", "forecast", "doctor", "compare"},
    {"cli"},
    {"__main__", "worker"},
    {"testing"},
)
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}
TOP = {"__version__"}
"""Names that ``distill/__init__.py`` holds itself."""


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import hides its layer"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_only_from_below(file: Path) -> None:
    room = _room(file)
    assert room in HEIGHT, f"{room}: not in the plan; add it to LAYERS"
    wrong = []
    for line, name in _imports(file):
        top, *rest = name.split(".")
        if top == "distill" and rest and rest[0] not in {room, *TOP} and HEIGHT.get(rest[0], 99) >= HEIGHT[room]:
            wrong.append(f"{file.relative_to(PACKAGE.parent)}:{line}: {room} imports {name}")
    assert wrong == []


def test_only_one_file_imports_wandb() -> None:
    users = {file for file in FILES for _, name in _imports(file) if name.split(".")[0] == "wandb"}
    assert users == {PACKAGE / "tracking" / "wandb.py"}


HEAVY = {"torch", "transformers", "pytorch_lightning", "lightning", "datasets", "peft", "matplotlib"}


def test_core_needs_nothing_heavy() -> None:
    found = {name.split(".")[0] for file in FILES if _room(file) == "core" for _, name in _imports(file)}
    assert found & (HEAVY | {"numpy"}) == set()


@pytest.mark.parametrize("room", sorted(LAYERS[1]))
def test_maths_needs_torch_alone(room: str) -> None:
    found = {name.split(".")[0] for file in FILES if _room(file) == room for _, name in _imports(file)}
    assert found & HEAVY <= {"torch"}
