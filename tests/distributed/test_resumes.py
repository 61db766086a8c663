"""Cells of the resume matrix, of which ``benchmarks.faults`` runs all: enough that every choice is in one of them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from tests.faults.cells import DATA, KILLED, REFUSED, TRAINED, WORLDS, Cell, Text, pairs
from tests.faults.resumes import Moved, Resumes, differing
from tests.faults.workers import Workers

EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def resumes(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Resumes:
    folder = tmp_path_factory.mktemp("resumes")
    return Resumes(workers, Text(folder / "text").make(workers), folder)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            Cell("QAT, learned scales", "stream", killed="end of epoch", micro_batches=1, num_workers=2),
            marks=EXHAUSTIVE,
        ),
        Cell("LoRA, its own teacher", "by length", killed="mid-epoch"),
        pytest.param(Cell("cached teacher", "padded", killed="end of epoch", num_workers=2), marks=EXHAUSTIVE),
        pytest.param(Cell("on-policy samples", "documents", killed="mid-epoch", micro_batches=1), marks=EXHAUSTIVE),
        pytest.param(Cell("hidden-state losses", "by loss", "2, ddp", killed="mid-epoch"), marks=EXHAUSTIVE),
        pytest.param(Cell("on-policy samples", "chat", killed="mid-epoch", num_workers=2), marks=EXHAUSTIVE),
        pytest.param(
            Cell("cached teacher", "mixture", "2, ddp", killed="end of epoch", num_workers=2), marks=EXHAUSTIVE
        ),
    ],
    ids=lambda cell: f"{cell.trained} {cell.data}",
)
def test_a_killed_cell_goes_on_to_the_last_bit(cell: Cell, resumes: Resumes) -> None:
    assert resumes.difference(cell) is None


def test_another_training_is_told_apart(resumes: Resumes, tmp_path: Path) -> None:
    """Else the test above could not fail."""
    for name, dropout in (("wet", True), ("dry", False)):
        resumes._run(Cell(dropout=dropout), tmp_path / name, None)
    assert differing(tmp_path / "wet", tmp_path / "dry") == "model.safetensors"


@pytest.mark.exhaustive
def test_one_process_goes_on_where_two_were(resumes: Resumes) -> None:
    moved = resumes.moved([Cell(data="chat", world="2, ddp", dropout=False), Cell(data="chat", dropout=False)])
    assert moved == Moved(other_rows=0, loss_difference=pytest.approx(0, abs=1e-5))


def test_any_two_choices_meet_in_a_cell() -> None:
    chosen = pairs()
    assert len(chosen) >= 40
    columns = [("trained", TRAINED), ("data", DATA), ("world", WORLDS), ("killed", KILLED)]
    for (one, ones), (other, others) in combinations(columns, 2):
        met = {(getattr(cell, one), getattr(cell, other)) for cell in chosen}
        missing = {(a, b) for a in ones for b in others} - met
        assert missing <= REFUSED
