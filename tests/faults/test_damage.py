"""A few damages of a finished run, each under a command that reads the file: none is taken as it is without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.runner import run
from tests.faults.damage import ADDED, COMMANDS, Damages, damage_material, damage_recipe

AGAIN, NEXT, REPORT, COMPARE = COMMANDS
CASES = (
    ("student/model/model.safetensors", "one bit flipped", NEXT, "made again"),
    ("student/model/model.safetensors", "another stage's file", COMPARE, "refused"),
    ("student/model/config.json", "one number edited", NEXT, "refused"),
    ("student/model/adapter_config.json", ADDED, NEXT, "refused"),
    ("evaluate/rows.json", "one number edited", REPORT, "refused"),
    ("evaluate/rows.json", "gone", AGAIN, "made again"),
    ("base/DONE", "one bit flipped", AGAIN, "refused"),
    ("base/plan.json", "cut in half", AGAIN, "told"),
)


@pytest.fixture(scope="module")
def damages(tmp_path_factory: pytest.TempPathFactory) -> Damages:
    folder = tmp_path_factory.mktemp("damage")
    recipe = damage_recipe(*damage_material(folder))
    return Damages(recipe, run(recipe, folder / "run", say=lambda line: None).folder, folder / "copies")


@pytest.mark.parametrize(("file", "fault", "command", "outcome"), CASES)
def test_nothing_damaged_is_taken_without_a_word(
    damages: Damages, file: str, fault: str, command: str, outcome: str
) -> None:
    [case] = damages.under(Path(file), fault, (command,))
    assert (case.outcome, case.command) == (outcome, command), case.said


def test_a_damage_that_is_taken_without_a_word_would_be_found(
    damages: Damages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.core.run_folder.changes", lambda *given, **named: [])
    [case] = damages.under(Path("evaluate/rows.json"), "one number edited", (REPORT,))
    assert case.outcome == "silent", case.said
