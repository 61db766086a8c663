"""Tables: units in the headers, a dash for what was not measured, "simulated" where that is why."""

from __future__ import annotations

import csv
import io

from distill.reporting.tables import (
    BY_KEY,
    COLUMNS,
    best,
    cell,
    csv_table,
    markdown_table,
    measured_figures,
    shown,
    whole_table,
)
from distill.reporting.tradeoff import Row

ROWS = [
    Row("distill", weight_bytes=2_000_000, perplexity=60.0, decode_tokens_per_s=200.0, notes="a|b"),
    Row("teacher", "teacher", weight_bytes=4_000_000, perplexity=50.0, decode_tokens_per_s=100.0),
    Row("int4", scheme="int4", weight_bytes=500_000, kernel="simulated", engine="transformers"),
]


def test_markdown() -> None:
    lines = markdown_table(ROWS).splitlines()
    assert "On disk [MB]" in lines[0]
    assert "Decode [tokens/s]" in lines[0]
    assert lines[2].startswith("| teacher |")
    assert "a\\|b" in lines[3]
    assert "simulated" in lines[4]
    assert "—" in lines[4]
    assert "**0.500**" in lines[4]
    assert "KL to teacher" not in lines[0]  # nobody has one


def test_nothing_is_simulated_where_no_speed_was_asked_for() -> None:
    rows = [Row("teacher", "teacher", perplexity=50.0), Row("int4", scheme="int4", kernel="simulated", perplexity=60.0)]
    assert [column.key for column in shown(rows)] == ["perplexity"]
    assert [line.split(" | ")[-2] for line in markdown_table(rows).splitlines()[2:]] == ["—", "—"]
    assert "simulated" not in csv_table(rows).splitlines()[1].split(",")


def test_csv_reads_back() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(ROWS))))
    assert [row["model"] for row in rows] == ["teacher", "distill", "int4"]
    assert float(rows[1]["On disk [MB]"]) == 2.0
    assert rows[1]["KL to teacher [nats/token]"] == ""
    assert rows[2]["Decode [tokens/s]"] == "simulated"
    assert rows[2]["Perplexity"] == ""
    assert len({len(row) for row in rows}) == 1


def test_best_ignores_the_teacher_and_noise() -> None:
    assert best(ROWS, BY_KEY["perplexity"]) == set()  # only one student has a figure
    fast = [Row("a", decode_tokens_per_s=100.0), Row("b", decode_tokens_per_s=98.0), Row("c", decode_tokens_per_s=60.0)]
    assert best(fast, BY_KEY["decode_tokens_per_s"]) == {"a", "b"}
    exact = [Row("a", perplexity=10.0), Row("b", perplexity=10.1)]
    assert best(exact, BY_KEY["perplexity"]) == {"a"}
    assert best(exact * 2, BY_KEY["training_tokens"]) == set()


def test_cells() -> None:
    assert cell(ROWS[2], BY_KEY["prefill_ms"]) == "simulated"
    assert cell(ROWS[0], BY_KEY["prefill_ms"]) == "—"
    assert cell(Row("x", top1_agreement=0.7251), BY_KEY["top1_agreement"]) == "72.5"


def test_tools_that_filter_get_every_column() -> None:
    rows = [Row("int4", kernel="simulated", perplexity=4.0), Row("teacher", "teacher", perplexity=3.0)]
    headings, *cells = whole_table(rows)
    assert headings[:3] == ["model", "role", "kernel"]
    assert [len(row) for row in (headings, *cells)] == [3 + len(COLUMNS)] * 3
    assert [row[0] for row in cells] == ["teacher", "int4"]
    assert measured_figures(rows) == {"teacher/perplexity": 3.0, "int4/perplexity": 4.0}
