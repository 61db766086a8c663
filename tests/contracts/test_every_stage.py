"""The contract of a stage: it runs, it says before the run what it will do, and nobody else says it for it."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import distill
from distill.stages import STAGES, StageSpec

PACKAGE = Path(distill.__file__).parent
KIND_BLIND = [
    *sorted((PACKAGE / "forecast").glob("*.py")),
    *(PACKAGE / f"{name}.py" for name in ("finished", "recipe", "runner")),
]
CONTRACT = {"MAKERS", "STAGES", "StageSpec", "base", "chat", "forecast", "session", "text"}
"""What of ``distill.stages`` can be known without knowing a kind of stage."""

stage = pytest.mark.parametrize("spec", [spec for _, spec in STAGES.items()], ids=list(STAGES))


def lacking(spec: type[StageSpec]) -> list[str]:
    """What of the contract a stage leaves to its base class, which has nothing to say."""
    own = {name for name in ("forecast", "run") if getattr(spec, name) is not getattr(StageSpec, name)}
    package, _, file = spec.__module__.rpartition(".")
    if file == "spec" and find_spec(f"{package}.run") is not None:
        own.add("run")
    return sorted({"forecast", "run"} - own)


@stage
def test_runs_and_says_before_what_it_will_do(spec: type[StageSpec]) -> None:
    assert lacking(spec) == [], "see distill/stages/base.py"


def test_a_stage_that_says_nothing_does_not_pass() -> None:
    class Silent(StageSpec):
        """It only runs."""

        def run(self, context: Any) -> dict[str, Any]:
            return {}

    assert lacking(Silent) == ["forecast"]


@pytest.mark.parametrize("file", KIND_BLIND, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_names_no_kind_of_stage(file: Path) -> None:
    """What is printed of a stage, and when it runs, follows from its contract alone."""
    kinds, classes = {*STAGES}, {spec.__name__ for _, spec in STAGES.items()}
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill.stages"):
            path = [*str(node.module).split(".")[2:3], *(alias.name for alias in node.names)]
            found += [path[0]] if path[0] not in CONTRACT else []
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            found += [name] if name in classes else []
        if isinstance(node, ast.Constant) and node.value in kinds:
            found.append(str(node.value))
    assert found == []
