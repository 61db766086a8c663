"""A run has one W&B run, whose id stays with the run folder, and says how an offline one is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.recipe import Recipe
from distill.runner import run
from tests.faults.damage import damage_material


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    teacher, text = damage_material(tmp_path)
    content = {
        "name": "curves",
        "teacher": str(teacher),
        "data": {"train": {"kind": "jsonl", "path": str(text)}, "sequence_length": 16, "validation_tokens": 60},
        "stages": {"distill": {"student": "teacher", "num_steps": 1, "batch_size": 2}},
        "compute": {"accelerator": "cpu", "num_workers": 0},
        "logging": {"wandb": "offline"},
    }
    return Recipe.model_validate(content)


def test_a_run_that_goes_on_has_the_same_curves(recipe: Recipe, tmp_path: Path) -> None:
    folder, said = tmp_path / "run", list[str]()
    run(recipe, folder, say=said.append)
    number = (folder / "wandb-id").read_text()
    run(recipe, folder, start="distill", say=said.append)
    offline = [place for place in (folder / "wandb").glob("offline-run-*") if place.is_dir()]
    assert {place.name.rpartition("-")[2] for place in offline} == {number}
    assert {file.name for place in offline for file in place.glob("*.wandb")} == {f"run-{number}.wandb"}
    told = [line for line in said if "wandb sync" in line]
    assert len(told) == 2
    assert all(Path(line.rpartition("wandb sync ")[2]) in offline for line in told)
    run(recipe, tmp_path / "other", say=said.append)
    assert (tmp_path / "other" / "wandb-id").read_text() != number
