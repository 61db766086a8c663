"""The plan of the house: a module imports from lower layers or its own folder, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distill"
LAYERS = (
    {"core"},
    {"numerics"},
    {"losses", "pruning", "quantization"},
    {"pretrained"},
    {"models", "data"},
    {"training", "evaluation", "exporters", "tracking"},
    {"reporting"},
    {"stages"},
    {"recipe", "recipes", "launch", "finished", "required", "show_rows"},
    {"api"},
    {"runner", "listing", "forecast", "doctor", "compare", "show_data"},
    {"watch", "trace", "one_stage"},
    {"cli_stages"},
    {"cli"},
    {"__main__", "worker"},
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


def _module(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


BENCHMARKS = PACKAGE.with_name("benchmarks")
FOLDERS = [*sorted({folder for folder in PACKAGE.iterdir() if any(folder.glob("*.py"))}), BENCHMARKS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_circle_of_files(folder: Path) -> None:
    """Imports inside functions and for annotations count too: who reads one file of a circle must read them all."""
    files = {_module(file): file for file in folder.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        names = {name for _, name in _imports(file)}
        graph[module] = {name if name in files else name.rpartition(".")[0] for name in names} & {*files} - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


MOST_LATE_IMPORTS = 200


def test_imports_stand_at_the_top() -> None:
    """Late ones are for what specs and the command line must not wait for, and for packages that may be missing."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    late = {
        (file, statement.lineno)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, functions)
        for statement in ast.walk(node)
        if isinstance(statement, ast.Import | ast.ImportFrom)
    }
    assert 0 < len(late) <= MOST_LATE_IMPORTS


def test_only_one_file_imports_wandb() -> None:
    users = {file for file in FILES for _, name in _imports(file) if name.split(".")[0] == "wandb"}
    assert users == {PACKAGE / "tracking" / "wandb.py"}


HEAVY = {"torch", "transformers", "pytorch_lightning", "lightning", "datasets", "peft", "matplotlib"}


def test_core_needs_nothing_heavy() -> None:
    found = {name.split(".")[0] for file in FILES if _room(file) == "core" for _, name in _imports(file)}
    assert found & (HEAVY | {"numpy"}) == set()


@pytest.mark.parametrize("room", sorted(LAYERS[1] | LAYERS[2]))
def test_maths_needs_torch_alone(room: str) -> None:
    found = {name.split(".")[0] for file in FILES if _room(file) == room for _, name in _imports(file)}
    assert found & HEAVY <= {"torch"}


SHARED = {
    "__init__", "base", "spec", "run",  # of every folder that has parts, or a stage
    "chat", "mixture", "text", "tokens", "tokenizing",  # a kind of data, and its forecast or its use by stages
    "export", "load", "lora", "kv_cache",  # one thing, for two kinds of callers or files
    "domains", "ends", "outlook", "threads",  # what is measured or decided, and who shows or applies it
}  # fmt: skip
"""Names of files that do the same for two folders."""


def test_two_files_share_a_name_only_if_they_do_the_same() -> None:
    files: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        files.setdefault(file.stem, []).append(file.relative_to(PACKAGE).as_posix())
    shared = {name: found for name, found in files.items() if len(found) > 1 and name not in SHARED}
    assert not shared, f"rename the more special one: {shared}"
