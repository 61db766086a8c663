"""``teacher: self`` in a recipe: no second model is loaded, and what cannot be is refused before anything runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import RecipeError
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run
from distill.training.metrics import read_rows

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
stages:
  qat:
    {{kind: quantize, student: teacher, teacher: {of_qat}, lora: {lora}, num_steps: 2, batch_size: 2}}
  tuned:
    kind: distill
    student: teacher
    teacher: self
    lora: {{r: 2}}
    losses: {losses}
    num_steps: 2
    batch_size: 2
compute: {{accelerator: cpu, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""
NAMES = {"lora": "{r: 2}", "losses": "[forward_kl, cross_entropy]", "of_qat": "self"}


@pytest.fixture
def recipe(teacher: Path, text: Path) -> Any:
    def make(**names: str) -> Recipe:
        return Recipe.from_text(RECIPE.format(teacher=teacher, text=text, **NAMES | names))

    return make


def test_it_learns_what_a_loaded_copy_teaches_and_loads_none(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = run(recipe(of_qat="teacher"), tmp_path / "live", say=lambda _: None).folder

    def never(*_: Any) -> Any:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr("distill.stages.models.load_in_vocabulary", never)
    own = run(recipe(), tmp_path / "own", say=lambda _: None).folder
    for expected, row in zip(read_rows(live / "qat"), read_rows(own / "qat"), strict=True):
        for key in expected:
            if key.startswith(("train/", "val/")):
                assert row[key] == expected[key], key
    lineage = json.loads((own / "qat" / "model" / "distill.json").read_text())
    assert lineage["teacher"] == "teacher"
    first = next(row for row in read_rows(own / "tuned") if "train/kl" in row)
    assert first["train/kl"] == pytest.approx(0, abs=1e-6)


def test_the_plan_names_no_model_called_self(recipe: Any) -> None:
    plan = describe(recipe())
    assert "qat (quantize): reads teacher;" in plan
    assert "self" not in plan


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ({"lora": "null"}, "teacher: self is the student as it starts, which only adapters keep; add lora: {}"),
        ({"losses": "[forward_kl]"}, "teacher: self teaches nothing here"),
    ],
)
def test_what_cannot_be_is_refused(names: dict[str, str], line: str, recipe: Any) -> None:
    with pytest.raises(RecipeError, match=re.escape(line)):
        recipe(**names)
