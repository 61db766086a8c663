"""Scores on tasks in the report: what is named a difference, what was required, and cells that are no formulas."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from distill.core.errors import InputError
from distill.evaluation.tasks.base import Answer, Answers
from distill.reporting.require import outcomes, parsed
from distill.reporting.tables import csv_table
from distill.reporting.task_scores import TaskScores, merged, read_scores, to_json
from distill.reporting.task_tables import pair_rows, points, score_rows
from distill.reporting.task_verdict import task_verdict
from distill.reporting.tradeoff import Row
from distill.reporting.write_report import RunFacts, write_report
from distill.stages.evaluate.score_pairs import compared

ROWS = [
    Row("teacher", "teacher", perplexity=10.0, loss_nats=2.3),
    Row("prune", perplexity=40.0, loss_nats=3.7),
    Row("distill", kind="distill", parent="prune", perplexity=12.0, loss_nats=2.5, training_tokens=5),
    Row("ce", "control", kind="finetune", parent="prune", perplexity=13.0, loss_nats=2.6, training_tokens=5),
]


def answers(rights: str, words: str = "q") -> Answers:
    """ "1" is a right answer."""
    made = [
        Answer(f"f:{i}", f"{words}{i}", "yes" if one == "1" else "no", "yes", one == "1", None, None, (-1.0, -2.0))
        for i, one in enumerate(rights)
    ]
    return Answers(tuple(made), chance=0.5)


def scores(rows: list[Row] = ROWS) -> TaskScores:
    """On ``far`` the student loses 20 of 100, on ``near`` 2; beside the control it gains 1."""
    all_right, far, near = "1" * 90 + "0" * 10, "1" * 70 + "0" * 30, "1" * 88 + "0" * 12
    given = {}
    for row in rows:
        given["far", row.name] = answers(all_right if row.role == "teacher" else far)
        given["near", row.name] = answers(all_right if row.role == "teacher" else near)
    given["far", "ce"] = answers("1" * 69 + "0" * 31)
    return compared(rows, given)


def test_a_difference_is_named_where_it_is_shown() -> None:
    found = scores()
    pairs = {(pair.first, pair.second, pair.task): pair for pair in found.pairs}
    far, near = pairs["teacher", "distill", "far"], pairs["teacher", "distill", "near"]
    assert (far.lost, far.gained, far.changed) == (20, 0, 0.2)
    assert far.p == pytest.approx(2 / 2**20)
    assert far.p_holm == pytest.approx(2 * far.p)  # two tasks
    assert near.p == near.p_holm == 0.5
    assert far.is_shown
    assert not near.is_shown
    assert far.low < far.difference == -0.2 < far.high < 0
    said = task_verdict(found, ROWS)
    assert said == [
        "distill on tasks: far 70.0 % against 90.0 %, 20.0 points worse (p < 0.001), 50.0 ± 10.1 % kept above chance; "
        "near 88.0 % against 90.0 %, no difference shown (7.0 points or more would be), 95.0 ± 3.5 % kept above "
        "chance.",
        "distill beside ce: far no difference shown (7.0 points or more would be); near no difference shown "
        "(7.0 points or more would be).",
    ]
    rows = {tuple(row[:2]): row for row in pair_rows(found)}
    assert rows["teacher → distill", "far"][-1] == "worse"
    assert rows["ce → distill", "far"][2] == "+1.0"
    assert score_rows(found)[1][:4] == ["far", "teacher", "100", "90.0 ± 3.0"]


def test_models_that_were_not_asked_the_same_are_not_compared() -> None:
    given = {("t", row.name): answers("1100", "other" if row.name == "ce" else "q") for row in ROWS}
    found = compared(ROWS, given)
    assert {(pair.first, pair.second) for pair in found.pairs} == {("teacher", "prune"), ("teacher", "distill")}
    assert "teacher and ce were not asked the same in t, so they are not compared" in found.notes
    assert found.of("ce", "t").recovery is None  # type: ignore[union-attr]


def test_what_is_written_is_read_again_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "evaluate" / "tasks.json"
    file.parent.mkdir()
    file.write_text(to_json(scores()))
    assert read_scores(file) == scores()
    file.write_text(to_json(scores()).replace('"lost": 20', '"lost": -20'))
    with pytest.raises(InputError, match=r"pairs.*lost.*measure again by --from evaluate"):
        read_scores(file)
    again = merged([scores(), scores([row for row in ROWS if row.name != "prune"])])
    assert again.models == ["teacher", "prune", "distill", "ce"]


def test_what_was_required() -> None:
    require = {
        "perplexity": "<= 1.2 of teacher",
        "prune/perplexity": "<= 1.2 of teacher",
        "far": ">= 0.7",
        "near": ">= 0.99 of teacher",
        "far.recovery": ">= 60 %",
        "decode_tokens_per_s": "> 10",
    }
    found = {one.key: one for one in outcomes(require, ROWS, scores())}
    assert {key: one.reached for key, one in found.items()} == {
        "perplexity": True,
        "prune/perplexity": False,
        "far": True,
        "near": False,
        "far.recovery": False,
        "decode_tokens_per_s": False,
    }
    assert found["prune/perplexity"].line == (
        "require.prune/perplexity: <= 1.2 of teacher is not reached: prune has 40.00, <= 12.00 (1.200 of teacher's "
        "10.00) is required"
    )
    assert found["decode_tokens_per_s"].said == "decode_tokens_per_s of distill was not measured"
    assert not outcomes({"far": "> 0"}, ROWS[:1], scores())[0].reached


@pytest.mark.parametrize("text", ["", "0.9", ">= teacher", "== 3", ">= 0.9 of", ">= 0.9 of a b", ">= -1", ">= 1e999x"])
def test_what_is_no_bound(text: str) -> None:
    with pytest.raises(ValueError, match="is no bound"):
        parsed(text)


def test_no_cell_of_a_spreadsheet_is_a_formula(tmp_path: Path) -> None:
    evil = '=HYPERLINK("http://x","y")'
    rows = [replace(ROWS[0], name="-1+1"), Row(evil, notes="@SUM(1)", scheme="+x", parent="\tcmd", perplexity=3.0)]
    cells = [cell for line in csv.reader(csv_table(rows).splitlines()) for cell in line]
    assert f"'{evil}" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]
    given = {("t", row.name): answers("1100") for row in rows}
    write_report(rows, {}, [], RunFacts("r"), tmp_path, scores=compared(rows, given))
    for name in ("tasks.csv", "pairs.csv"):
        with (tmp_path / name).open(newline="") as stream:
            texts = [cell for line in csv.reader(stream) for cell in line]
        assert not [cell for cell in texts if cell.startswith(("=", "+", "@")) or cell.startswith("-1+")]
        assert any(cell.startswith("'=") for cell in texts)


def test_the_page_escapes_what_models_and_tasks_are_called(tmp_path: Path) -> None:
    rows = [replace(ROWS[0], name="teacher"), Row("<b>x</b>", perplexity=3.0)]
    given = {("t", row.name): answers("1100") for row in rows}
    write_report(rows, {}, [], RunFacts("r"), tmp_path, scores=compared(rows, given))
    assert "<b>x</b>" not in (tmp_path / "index.html").read_text()
    assert "<b>x" not in (tmp_path / "report.md").read_text()


def test_points() -> None:
    assert points(-0.0004, sign=True) == "+0.0"
    assert points(-0.021, sign=True) == "\N{MINUS SIGN}2.1"
    assert points(0.5) == "50.0"
