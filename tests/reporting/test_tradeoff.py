"""The Pareto set, the gaps and the verdict: right, and honest where the student is worse."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace
from typing import Any

import pytest

from distill.core.errors import InputError
from distill.reporting.tables import percent, significant
from distill.reporting.tradeoff import Row, from_json, gap_closed, pareto, to_json
from distill.reporting.verdict import controls, gaps, main_student, verdict

TEACHER = Row("teacher", "teacher", non_embedding_parameters=100, weight_bytes=400, loss_nats=4.0, perplexity=54.6,
              decode_tokens_per_s=100.0)  # fmt: skip
PRUNED = Row("prune", kind="prune", parent="teacher", loss_nats=6.0, perplexity=403.0, training_tokens=0)
STUDENT = Row("distill", kind="distill", parent="prune", non_embedding_parameters=54, weight_bytes=220, loss_nats=4.5,
              perplexity=90.0, decode_tokens_per_s=160.0, training_tokens=1000)  # fmt: skip


@pytest.mark.parametrize("cost", ["weight_bytes", "decode_tokens_per_s"])
@pytest.mark.parametrize("seed", range(5))
def test_pareto_against_brute_force(cost: str, seed: int) -> None:
    draw = random.Random(seed)
    rows = [Row(str(i), perplexity=draw.randint(1, 6), **{cost: draw.randint(1, 6)}) for i in range(12)]
    sign = -1 if cost == "decode_tokens_per_s" else 1
    points = {row.name: (row.perplexity, sign * getattr(row, cost)) for row in rows}
    beaten = {
        a for a, b in itertools.permutations(points, 2)
        if points[b] != points[a] and all(x <= y for x, y in zip(points[b], points[a], strict=True))
    }  # fmt: skip
    assert pareto(rows, "perplexity", cost) == set(points) - beaten


def test_pareto_leaves_out_what_was_not_measured() -> None:
    rows = [
        Row("a", perplexity=1.0),
        Row("b", perplexity=float("nan"), weight_bytes=1),
        Row("c", perplexity=9.0, weight_bytes=9),
    ]
    assert pareto(rows) == {"c"}


@pytest.mark.parametrize(
    ("before", "after", "target", "share"),
    [
        (6.0, 4.5, 4.0, 0.75), (6.0, 4.0, 4.0, 1.0), (6.0, 3.5, 4.0, 1.25), (6.0, 6.5, 4.0, -0.25),
        (4.0, 3.9, 4.0, None), (4.0, 3.9, 4.5, None), (None, 1.0, 1.0, None), (6.0, float("nan"), 4.0, None),
    ],
)  # fmt: skip
def test_gap_closed(before: float | None, after: float | None, target: float | None, share: float | None) -> None:
    assert gap_closed(before, after, target) == (None if share is None else pytest.approx(share))


def test_training_gaps_in_words() -> None:
    (gap,) = gaps([PRUNED, STUDENT, TEACHER])
    assert (gap.kind, gap.before.name, gap.share) == ("training", "prune", pytest.approx(0.75))
    assert "closed 75 % of the loss gap between prune and teacher" in gap.text
    worse = gaps([PRUNED, Row("d", parent="prune", loss_nats=6.2, training_tokens=1), TEACHER])[0].text
    assert "10 % larger" in worse
    none = gaps([Row("p", loss_nats=3.0), Row("d", parent="p", loss_nats=2.9, training_tokens=1), TEACHER])[0].text
    assert "no gap to close" in none
    beyond = gaps([PRUNED, Row("d", parent="prune", loss_nats=3.9, training_tokens=1), TEACHER])[0].text
    assert "better than teacher" in beyond


def test_rounding_gap_follows_the_line_of_parents() -> None:
    rows = [
        TEACHER, PRUNED, STUDENT,
        Row("ptq", parent="distill", scheme="int4", loss_nats=4.9, training_tokens=0),
        Row("ptq8", parent="distill", scheme="int8", loss_nats=4.51, training_tokens=0),
        Row("tune", parent="distill", loss_nats=4.48, training_tokens=10),
        Row("qat", parent="tune", scheme="int4", loss_nats=4.6, training_tokens=0),
    ]  # fmt: skip
    (gap,) = [gap for gap in gaps(rows) if gap.kind == "rounding"]
    assert (gap.before.name, gap.after.name, gap.target.name) == ("ptq", "qat", "distill")
    assert gap.share == pytest.approx(0.75)
    looped = [Row("a", parent="b", scheme="s", loss_nats=1.0), Row("b", parent="a", scheme="s", loss_nats=1.0)]
    assert gaps(looped) == []


def test_controls_say_when_distillation_did_not_pay() -> None:
    def said(loss: float, tokens: int = 1000) -> str:
        control = Row("labels", "control", parent="prune", loss_nats=loss, training_tokens=tokens)
        return controls([TEACHER, PRUNED, STUDENT, control])[0]

    assert "distill is 0.100 better than labels after the same number of training tokens" in said(4.6)
    assert "labels is 0.100 better than distill, so distillation did not help here" in said(4.4)
    assert "a difference of less than 0.01 after the same" in said(4.505)
    assert "2 times the training tokens" in said(4.6, 2000)
    plain = Row("plain", "control", kind="distill", parent="prune", loss_nats=4.4, training_tokens=1000)
    assert "plain is 0.100 better than distill after" in controls([TEACHER, PRUNED, STUDENT, plain])[0]


def test_verdict_is_made_of_the_figures() -> None:
    low = Row(
        "int4", parent="distill", scheme="int4", kernel="simulated", engine="transformers", weight_bytes=64,
        loss_nats=4.9, perplexity=134.0,
    )  # fmt: skip
    text = verdict([PRUNED, STUDENT, low, TEACHER])
    assert (
        "54 % of the teacher's non-embedding parameters, 1.60x its decode speed, perplexity 90.0 against 54.6" in text
    )
    assert "training closed 75 % of the loss gap to the teacher" in text
    assert "int4: 16 % of the teacher's bytes, speed not measured (its kernel is simulated here)" in text
    unasked = verdict([PRUNED, STUDENT, replace(low, engine=None), TEACHER])
    assert "int4: 16 % of the teacher's bytes, speed not measured, perplexity 134" in unasked


def test_verdict_does_not_hide_a_bad_student() -> None:
    bad = Row("distill", parent="prune", non_embedding_parameters=54, loss_nats=6.5, perplexity=665.0,
              decode_tokens_per_s=80.0, training_tokens=9)  # fmt: skip
    text = verdict([TEACHER, PRUNED, bad])
    assert "0.80x its decode speed (slower)" in text
    assert "25 % larger" in text
    same = verdict([TEACHER, Row("s", decode_tokens_per_s=103.0)])
    assert "no faster" in same
    assert "quality not measured" in same
    assert verdict([TEACHER]) == "No student was measured."
    assert "no teacher was measured" in verdict([STUDENT])


def test_speeds_of_a_busy_machine_are_not_told_as_fact() -> None:
    def told(*speeds: float) -> str:
        sizes = {"parameters": 10, "weight_bytes": 40}
        return verdict([TEACHER, *(Row(f"s{i}", decode_tokens_per_s=v, **sizes) for i, v in enumerate(speeds))])

    assert "uncertain: models of the same shape differ by 77 %" in told(91.2, 161.7)
    assert "uncertain" not in told(150.0, 161.7)
    assert "uncertain" not in verdict([TEACHER, Row("s", parameters=10, weight_bytes=40, decode_tokens_per_s=1.0)])


def test_main_student_prefers_exact_weights() -> None:
    low = Row("int4", scheme="int4")
    assert main_student([PRUNED, STUDENT, low, Row("c", "control")]) is STUDENT
    assert main_student([low]) is low
    assert main_student([TEACHER]) is None


def test_json_round_trip_and_strangers() -> None:
    rows = [TEACHER, STUDENT, Row("x", perplexity=1.0)]
    assert from_json(to_json(rows)) == rows
    with pytest.raises(InputError, match=r"rows: 0\.speed: unknown key \(got 1\); measure again"):
        from_json('[{"name": "a", "speed": 1}]')
    with pytest.raises(InputError, match="rows: Invalid JSON"):
        from_json("{")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"perplexity": 0.5}, "1.perplexity: "),
        ({"perplexity": 0}, "1.perplexity: "),
        ({"perplexity": -1.0}, "1.perplexity: "),
        ({"perplexity": float("nan")}, "1.perplexity: Input should be a finite number"),
        ({"perplexity": float("inf")}, "1.perplexity: Input should be a finite number"),
        ({"perplexity": "54.6"}, "1.perplexity: Input should be a valid number"),
        ({"perplexity": True}, "1.perplexity: "),
        ({"perplexity": [1.0]}, "1.perplexity: "),
        ({"loss_nats": -0.1}, "1.loss_nats: "),
        ({"bits_per_byte": -1e-3}, "1.bits_per_byte: "),
        ({"kl_to_teacher": -0.01}, "1.kl_to_teacher: "),
        ({"top1_agreement": 1.01}, "1.top1_agreement: "),
        ({"top1_agreement": -0.01}, "1.top1_agreement: "),
        ({"nonzero_share": 50}, "1.nonzero_share: "),
        ({"weight_bytes": -1}, "1.weight_bytes: "),
        ({"weight_bytes": 1.5}, "1.weight_bytes: Input should be a valid integer"),
        ({"weight_bytes": 10**400}, "1.weight_bytes: "),
        ({"parameters": "many"}, "1.parameters: "),
        ({"decode_tokens_per_s": 0}, "1.decode_tokens_per_s: "),
        ({"decode_tokens_per_s": float("inf")}, "1.decode_tokens_per_s: "),
        ({"prefill_ms": -3.0}, "1.prefill_ms: "),
        ({"training_tokens": -1}, "1.training_tokens: "),
        ({"training_seconds": float("nan")}, "1.training_seconds: "),
        ({"name": ""}, "1.name: "),
        ({"name": None}, "1.name: "),
        ({"name": ["a"]}, "1.name: "),
        ({"name": "teacher"}, "2 rows, of which 'teacher' is there more than once"),
        ({"role": "teacher"}, "2 teachers (teacher, distill), expected one at most"),
        ({"role": "judge"}, "1.role: "),
        ({"kind": 3}, "1.kind: "),
        ({"parent": 3}, "1.parent: "),
        ({"scheme": {}}, "1.scheme: "),
        ({"notes": None}, "1.notes: "),
        ({"kernel": "imagined"}, "1.kernel: "),
        ({"kernel": "simulated"}, "1: distill: a simulated kernel has no decode_tokens_per_s"),
        ({"device": 0}, "1.device: "),
        ({"speed": 1}, "1.speed: unknown key"),
    ],
)
def test_rows_that_nothing_can_have_measured_are_refused(change: dict[str, Any], said: str) -> None:
    rows = [asdict(TEACHER), asdict(STUDENT) | change]
    with pytest.raises(InputError) as refusal:
        from_json(json.dumps(rows), "runs/a/evaluate/rows.json")
    assert str(refusal.value).startswith(f"runs/a/evaluate/rows.json: {said}")
    assert str(refusal.value).endswith("; measure again")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["[]", "{}", "null", "[1]", "[null]", '[{"role": "teacher"}]', "", "[" * 100_000])
def test_what_is_no_list_of_rows_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^rows: .*; measure again$"):
        from_json(text)


def test_a_simulated_row_cannot_hold_speed() -> None:
    with pytest.raises(ValueError, match="decode_tokens_per_s"):
        Row("int4", kernel="simulated", decode_tokens_per_s=1.0)


def test_numbers_in_words() -> None:
    assert [percent(x) for x in (0.543, 0.0312, 1.2, 0.9999, 0.0)] == ["54 %", "3.1 %", "120 %", "99 %", "0 %"]
    assert [significant(x) for x in (58.0, 4.213, 1240.4, 0.0123, 0, float("inf"))] == [
        "58.0",
        "4.21",
        "1,240",
        "0.0123",
        "0",
        "inf",
    ]


def test_noise_puts_no_bad_model_on_the_speed_front() -> None:
    good = Row("good", perplexity=20.0, decode_tokens_per_s=600.0)
    bad = Row("bad", perplexity=300.0, decode_tokens_per_s=612.0)
    fast = Row("fast", perplexity=30.0, decode_tokens_per_s=700.0)
    assert pareto([good, bad, fast], cost="decode_tokens_per_s") == {"good", "fast"}
