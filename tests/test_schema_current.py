"""The JSON schema in the repository is the one of this code, and it takes the recipes that the code takes."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from distill.core.mistakes import IN_WORDS
from distill.core.source import read
from distill.listing import schema_text
from distill.recipe import FAMILIES, Recipe

FOLDER = Path(__file__).parents[1] / "recipes"
FILE = FOLDER / "recipe.schema.json"


def test_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == schema_text(), "run: distill schema recipes/recipe.schema.json"


def test_what_every_pattern_asks_for_is_said_in_words() -> None:
    patterns = set(re.findall(r'"pattern": ("(?:[^"\\\\]|\\\\.)*")', schema_text()))
    percentage = r"^\d+(\.\d+)?%$"  # for editors; the code reads it itself
    assert {json.loads(pattern) for pattern in patterns} - {percentage} == set(IN_WORDS)


def test_knows_every_key_and_kind() -> None:
    schema = json.loads(schema_text())
    assert set(schema["properties"]) == set(Recipe.model_fields)
    for family in FAMILIES.values():
        for _, spec in family.items():
            assert set(schema["$defs"][spec.__name__]["properties"]) == set(spec.model_fields)
            assert schema["$defs"][spec.__name__]["additionalProperties"] is False


def faults(data: dict[str, Any]) -> list[str]:
    """Where an editor would draw a red line."""
    return [".".join(map(str, error.absolute_path)) for error in _validator().iter_errors(data)]


@cache
def _validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.yaml")), ids=lambda file: file.stem)
def test_takes_every_recipe(file: Path) -> None:
    assert faults(read(file).data) == []


GOOD: dict[str, Any] = {
    "name": "a",
    "teacher": "org/model",
    "data": {"train": "python_docs", "sequence_length": 16},
    "stages": {
        "prune": {"keep": {"hidden_size": 8}},
        "student": {"kind": "distill", "student": "prune", "num_steps": 1, "losses": ["forward_kl"]},
        "evaluate": None,
    },
}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({}, []),
        ({"stages": {"evaluate": {}}}, []),
        ({"stages": {"prune": {"kind": "finetune", "model": "teacher", "num_steps": 1}}}, []),
        ({"nmae": 1}, [""]),
        ({"seed": "x"}, ["seed"]),
        ({"data": {"train": "text_files", "sequence_length": 16}}, ["data.train"]),
        ({"data": {"train": {"path": "x"}, "sequence_length": 16}}, ["data.train"]),
        ({"stages": {"prune": {"keep": {"hiden_size": 8}}}}, ["stages.prune"]),
        ({"stages": {"mine": {"keep": {"hidden_size": 8}}}}, ["stages.mine"]),
        ({"stages": {"prune": None}}, ["stages.prune"]),
        ({"stages": {"prune": {"keep": {}}}}, ["stages.prune"]),
        ({"stages": {"prune": {"keep": {"hidden_size": 8}, "search": None}}}, []),
        (
            {"stages": {"prune": {"keep": {"hidden_size": 8}, "search": {"budget": {"parameters": 9}}}}},
            ["stages.prune"],
        ),
    ],
)
def test_draws_the_line_where_the_code_does(change: dict[str, Any], where: list[str]) -> None:
    assert faults(GOOD | change) == where
