"""Exports beside the teacher's own file: what is said of them, and the table of speeds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.reporting.deliverables import compared, findings, speed_table
from distill.reporting.require import outcomes
from distill.reporting.tables import BY_KEY, cell, csv_table, markdown_table, shown
from distill.reporting.task_scores import TaskScores
from distill.reporting.tradeoff import Row, SpeedPoint, from_json, to_json
from distill.reporting.verdict import controls, gaps, main_student, verdict
from distill.reporting.view import TIMES, table
from distill.tracking.spec import Price

POINTS = (SpeedPoint(1, 128, 900.0, 40.0, 2_000_000), SpeedPoint(4, 512, 1100.0, 90.0, 3_000_000))
OWN = Row("export", kind="export", parent="cut", scheme="GGUF Q4_0", baseline="teacher as GGUF Q4_0",
          engine="llama.cpp", weight_bytes=80, loss_nats=3.2, perplexity=24.5, decode_tokens_per_s=40.0,
          prefill_joules=70.0, decode_joules=900.0, cpu_load=48.0, speeds=POINTS)  # fmt: skip
OTHER = replace(OWN, name="teacher as GGUF Q4_0", role="control", parent="teacher", baseline=None, weight_bytes=100,
                loss_nats=3.1, perplexity=22.2, decode_tokens_per_s=30.0, prefill_joules=None,
                decode_joules=None)  # fmt: skip
TEACHER = Row("teacher", "teacher", loss_nats=3.0, perplexity=20.1, decode_tokens_per_s=10.0, engine="transformers")
CUT = Row("cut", kind="distill", parent="teacher", loss_nats=3.1, perplexity=22.2, training_tokens=9)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({}, "smaller, faster, worse."),
        ({"weight_bytes": 100, "decode_tokens_per_s": 31.0}, "no smaller, no faster, worse, so it is no improvement"),
        ({"weight_bytes": 120, "decode_tokens_per_s": 20.0, "loss_nats": 3.105}, "larger, slower, no better, so it is"),
        ({"weight_bytes": 100, "loss_nats": 3.0, "decode_tokens_per_s": 30.0}, "no smaller, no faster, better."),
        ({"decode_tokens_per_s": None, "loss_nats": None, "perplexity": None}, ": smaller."),
    ],
)
def test_a_file_is_worth_its_training_where_it_beats_the_rounded_teacher(own: dict[str, float], words: str) -> None:
    (said,) = findings([TEACHER, replace(OWN, **own), OTHER])
    assert words in said
    assert said.startswith("export: ")
    assert said in verdict([TEACHER, CUT, replace(OWN, **own), OTHER])


def test_the_sentence_has_the_figures() -> None:
    (said,) = findings([OWN, OTHER])
    assert "80 % of the bytes of teacher as GGUF Q4_0, which was rounded without training" in said
    assert "1.33x its decode speed, perplexity 24.5 against 22.2" in said
    assert compared(OWN, OTHER) == {"smaller": 1, "faster": 1, "better": -1}
    assert findings([OWN]) == findings([OTHER, TEACHER]) == []
    assert verdict([OWN, OTHER]) == said, "also of a run that made nothing but files"


def test_losses_in_other_tokens_are_compared_in_bytes() -> None:
    """A cut vocabulary needs more tokens for the same text, so that each of them costs less."""
    cut = replace(OWN, loss_nats=1.5, bits_per_byte=1.3)
    whole = replace(OTHER, loss_nats=1.65, bits_per_byte=1.1)
    assert compared(cut, whole)["better"] == -1
    assert compared(replace(cut, bits_per_byte=1.1001), whole)["better"] == 0


def test_files_of_a_student_without_the_teacher_s_are_compared_with_none() -> None:
    ours = [replace(OWN, name=name, baseline=None) for name in ("hf", "onnx")]
    theirs = [replace(OWN, name=name, parent="teacher", baseline=None) for name in ("t16", "t4")]
    (said,) = findings([TEACHER, *ours, *theirs])
    assert said.startswith("t4: ")


def test_files_of_the_teacher_alone_are_compared_with_the_first() -> None:
    whole = replace(OWN, name="fp16", parent="teacher", baseline=None, weight_bytes=320, perplexity=20.1, loss_nats=3.0)
    small = replace(whole, name="int4", weight_bytes=80, decode_tokens_per_s=80.0, perplexity=24.5, loss_nats=3.2)
    assert verdict([whole, small]) == (
        "int4: 25 % of the bytes of fp16 (0.0 MB against 0.0 MB), 2.00x its decode speed, perplexity 24.5 against 20.1"
        ": smaller, faster, worse."
    )
    missing = [replace(row, install="pip install it", loss_nats=None, perplexity=None, decode_tokens_per_s=None,
                       speeds=()) for row in (whole, small)]  # fmt: skip
    assert findings(missing)[0].endswith("smaller, speed and quality not measured: pip install it.")


def test_files_are_no_students_and_no_controls() -> None:
    start = Row("prune", kind="prune", parent="teacher", loss_nats=5.0, perplexity=148.4)
    rows = [TEACHER, start, replace(CUT, parent="prune"), replace(OWN, training_tokens=0), OTHER]
    assert main_student(rows) is rows[2]
    assert controls(rows) == []
    assert {gap.after.name for gap in gaps(rows)} == {"cut"}


def test_a_missing_engine_is_the_command_that_installs_it() -> None:
    missing = Row(
        "export", kind="export", scheme="GGUF Q4_0", weight_bytes=80, install="pip install 'distill-lm[gguf]'"
    )
    assert cell(missing, BY_KEY["decode_tokens_per_s"]) == "pip install 'distill-lm[gguf]'"
    assert cell(missing, BY_KEY["prefill_ms"]) == "—"
    assert "pip install 'distill-lm[gguf]'" in markdown_table([TEACHER, missing])
    assert "pip install 'distill-lm[gguf]'" in csv_table([TEACHER, missing])
    assert speed_table([missing], None) == []


def test_energy_is_a_figure_or_not_measured() -> None:
    assert cell(OWN, BY_KEY["decode_joules"]) == "900"
    assert cell(OTHER, BY_KEY["decode_joules"]) == "not measured"
    keys = [column.key for column in shown([TEACHER, OTHER])]
    assert "decode_joules" not in keys, "no column of a machine without a counter"
    assert "decode_joules" in [column.key for column in shown([TEACHER, OWN])]


def test_every_batch_and_length_is_a_row_with_its_cost() -> None:
    head, *lines = speed_table([TEACHER, OWN, OTHER], Price(per_hour=3.6, currency="EUR"))
    assert head[-1] == "Decode [EUR per million tokens]"
    assert lines[0] == [
        "export", "llama.cpp", "1", "128", "900", "40.0", "2.00", "48.0", "70.0", "900", "25.0",
    ]  # fmt: skip
    assert lines[1][2:7] == ["4", "512", "1,100", "90.0", "3.00"]
    assert lines[1][7:] == ["—", "—", "—", "11.1"], "load and energy are those of the first point"
    assert lines[2][8:10] == ["not measured", "not measured"]
    assert len(speed_table([OWN], None)[0]) == len(head) - 1


def test_ratios_are_to_the_teacher_s_file_in_the_same_engine() -> None:
    lines = {line["row"].name: line for line in table([TEACHER, OWN, OTHER])["lines"]}
    keys = [column.key for column in table([TEACHER, OWN, OTHER])["columns"]]
    ratios = {name: line["cells"][keys.index("decode_tokens_per_s")]["ratio"] for name, line in lines.items()}
    assert ratios == {"teacher": "", "export": f"1.33{TIMES}", "teacher as GGUF Q4_0": ""}


def test_rows_of_files_read_back_and_can_be_required() -> None:
    assert from_json(to_json([TEACHER, OWN, OTHER])) == [TEACHER, OWN, OTHER]
    required = {"export/decode_tokens_per_s": ">= 39", "perplexity": "< 30"}
    found = outcomes(required, [TEACHER, CUT, OWN, OTHER], TaskScores())
    assert [one.reached for one in found] == [True, True]
    assert "cut has 22.20" in found[1].said, "what a figure without a model is of is a model"
