from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from distill.training.metrics import ROWS, TABLE, MetricsLog, as_csv, read_rows


def test_rows_are_on_disk_when_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "stage")
    log.write({"step": 1, "train/kl": 0.5})
    assert read_rows(tmp_path / "stage") == [{"step": 1, "train/kl": 0.5}]
    log.close()


def test_resume_drops_the_rows_after_its_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": step / 2})
    log.write({"step": 2, "val": 7.0})
    again = MetricsLog(tmp_path, step=2)
    again.write({"step": 3, "loss": 9.0})
    again.close()
    assert read_rows(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 2, "val": 7.0},
        {"step": 3, "loss": 9.0},
    ]
    MetricsLog(tmp_path, step=0)
    assert read_rows(tmp_path) == []


def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_rows(tmp_path) == [{"step": 1, "loss": 2.0}]
    log = MetricsLog(tmp_path, step=1)
    log.write({"step": 2, "loss": 3.0})
    assert read_rows(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}]
    log.close()


def test_the_table_has_a_column_a_key(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "train/kl": 0.5})
    log.write({"step": 1, "val/kl": 0.25})
    log.close()
    with (tmp_path / TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"step": "1", "train/kl": "0.5", "val/kl": ""}, {"step": "1", "train/kl": "", "val/kl": "0.25"}]
    assert as_csv([]).strip() == ""
    assert read_rows(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "1", "tokens": 2}',
        '{"step": true, "tokens": 2}',
        '{"step": -1, "tokens": 2}',
        '{"step": 1, "tokens": "2"}',
        '{"step": 1, "tokens": NaN}',
        '{"step": 1, "tokens": -2}',
        '{"step": 1, "val/kl": "0.5"}',
        '{"step": 1, "val/kl": null}',
        '{"step": 1, "val/kl": [0.5]}',
        '{"step": 1, "val/kl": 1' + "0" * 400 + "}",
        '{"tokens": 2}',
        '[{"step": 1}]',
        "[" * 100_000,
    ],
)
def test_a_row_of_anything_but_numbers_is_left_out(tmp_path: Path, line: str) -> None:
    rows = [{"step": 1, "tokens": 2, "val/kl": 0.5}, {"step": 2, "tokens": 4.5, "val/kl": 1}]
    (tmp_path / ROWS).write_text(f"{json.dumps(rows[0])}\n{line}\n{json.dumps(rows[1])}\n")
    assert read_rows(tmp_path) == rows
