"""Sentences on the run: loss gaps that training closed, comparisons with controls, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill.reporting.deliverables import EQUAL_NATS, findings
from distill.reporting.tables import BY_KEY, percent, significant
from distill.reporting.tradeoff import EQUAL_SPEED, OF_TASKS, Row, figure, gap_closed

NOISY_SPEED = 0.15
"""If decode speeds of models of the same shape differ by more than this, other processes disturbed the measurement."""


@dataclass(frozen=True)
class Gap:
    """The fraction of a loss gap that a stage closed.

    Attributes:
        kind: "training" (from the untrained student to the teacher) or "rounding" (from rounded to unrounded weights).
        before, after, target: the rows.
        share: see :func:`gap_closed`.
    """

    kind: Literal["training", "rounding"]
    before: Row
    after: Row
    target: Row
    share: float | None

    @property
    def text(self) -> str:
        """One sentence with the figures."""
        b, a, t = (float(row.loss_nats or 0.0) for row in (self.before, self.after, self.target))
        figures = f"{b:.3f} to {a:.3f} nats per token, {self.target.name} {t:.3f}"
        name, before = self.after.name, self.before.name
        gap = f"the loss gap between {before} and {self.target.name}"
        if self.kind == "rounding":
            gap = f"the loss that rounding without training ({before}) adds to {self.target.name}"
        if self.share is None:
            return f"{name}: {before} was no worse than {self.target.name}, so there was no gap to close ({figures})."
        if self.share < 0:
            return f"{name} made {gap} {percent(-self.share)} larger ({figures})."
        if self.share > 1:
            return f"{name} closed all of {gap} and ended better than {self.target.name} ({figures})."
        return (
            f"{name} {'recovered' if self.kind == 'rounding' else 'closed'} {percent(self.share)} of {gap} ({figures})."
        )


def gaps(rows: Sequence[Row]) -> list[Gap]:
    """All loss gaps that can be computed from the rows.

    Training: a trained row without quantization, the row from which it was made, and the teacher. Rounding: two rows
        with the same scheme and a common ancestor without quantization, of which one was trained since then.
    """
    named = {row.name: row for row in rows if row.loss_nats is not None and not row.is_file}
    teacher = next((row for row in named.values() if row.role == "teacher"), None)
    found = []
    for row in named.values():
        start = named.get(row.parent or "")
        if teacher and start and start is not teacher and row.training_tokens and row.scheme is None:
            share = gap_closed(start.loss_nats, row.loss_nats, teacher.loss_nats)
            found.append(Gap("training", start, row, teacher, share))
    rounded = [row for row in named.values() if row.scheme is not None]
    for plain in rounded:
        exact = named.get(plain.parent or "")
        if plain.training_tokens or exact is None or exact.scheme is not None:
            continue
        for trained in rounded:
            if trained.scheme == plain.scheme and _tokens_since(trained, exact, rows):
                share = gap_closed(plain.loss_nats, trained.loss_nats, exact.loss_nats)
                found.append(Gap("rounding", plain, trained, exact, share))
    return found


def _tokens_since(row: Row, ancestor: Row, rows: Sequence[Row]) -> int:
    """Training tokens from ``ancestor`` to ``row``; 0 if it is not an ancestor."""
    named = {r.name: r for r in rows}
    tokens, seen = 0, set[str]()
    here: Row | None = row
    while here is not None and here.name not in seen and here.name != ancestor.name:
        seen.add(here.name)
        tokens += here.training_tokens or 0
        here = named.get(here.parent or "")
    return tokens if here is not None and here.name == ancestor.name else 0


def main_student(rows: Sequence[Row]) -> Row | None:
    """The last student in the run's order without quantization; if there is none, the last student.

    Of several runs it is that of the first one.
    """
    students = [row for row in rows if row.role == "student" and not row.is_file]
    students = [row for row in students if row.run == students[0].run]
    return next((row for row in reversed(students) if row.scheme is None), students[-1] if students else None)


def controls(rows: Sequence[Row]) -> list[str]:
    """One sentence per control: how much better or worse it is than the distilled student."""
    sentences = []
    models = [row for row in rows if row.loss_nats is not None and not row.is_file]
    for control in (row for row in models if row.role == "control"):
        students = [row for row in models if row.role == "student"]
        alike = [row for row in students if row.scheme == control.scheme]
        peers = [row for row in alike if row.parent == control.parent and row.kind == "distill"]
        student = peers[-1] if peers else main_student(alike)
        if student is None or student.loss_nats is None or control.loss_nats is None:
            continue
        difference = control.loss_nats - student.loss_nats
        ends = f"{control.loss_nats:.3f} nats per token, {student.name} at {student.loss_nats:.3f}"
        said = f"{control.name} ends at {ends}: "
        if abs(difference) < EQUAL_NATS:
            said += f"a difference of less than {EQUAL_NATS:g}"
        else:
            better, worse = (student, control) if difference > 0 else (control, student)
            said += f"{better.name} is {abs(difference):.3f} better than {worse.name}"
            if difference < 0 and control.kind != "distill":  # a distilled control differs in something else
                said += ", so distillation did not help here"
        sentences.append(said + _same_tokens(student, control) + ".")
    return sentences


def _same_tokens(student: Row, control: Row) -> str:
    if not student.training_tokens:
        return ""
    if not control.training_tokens:
        return f" with {student.training_tokens:,} more training tokens"
    ratio = control.training_tokens / student.training_tokens
    if abs(ratio - 1) < 0.01:
        return " after the same number of training tokens"
    return f" (the control had {ratio:.2g} times the training tokens, so this is not a fair comparison)"


def verdict(rows: Sequence[Row]) -> str:
    """One or two sentences on the run, from measured figures only."""
    teacher = next((row for row in rows if row.role == "teacher"), None)
    student = main_student(rows)
    if student is None:
        return " ".join(said) if (said := findings(rows)) else "No student was measured."
    if teacher is None:
        line = f"{student.name}: {_quality(student, None)}; no teacher was measured, so nothing is compared."
        return " ".join([line, *findings(rows)])
    others = [row for row in rows if row.role == "student" and row is not student and not row.is_file]
    rounded = [row for row in others if row.scheme is not None]
    found = gaps(rows)
    sentences = []
    for row in [student, *rounded[-1:]]:
        parts = [_share_of(row, teacher), _speed(row, teacher), _quality(row, teacher)]
        sentence = f"{row.name}: " + ", ".join(part for part in parts if part)
        gap = next((gap for gap in reversed(found) if gap.after is row and gap.share is not None), None)
        sentences.append(sentence + (f"; {_closed(gap)}" if gap else "") + ".")
    sentences += findings(rows)
    if (noise := speed_noise(rows)) > NOISY_SPEED:
        sentences.append(
            f"Speeds are uncertain: models of the same shape differ by {percent(noise)}; "
            "measure again on an idle machine."
        )
    return " ".join(sentences)


def speed_noise(rows: Sequence[Row]) -> float:
    """Largest relative difference of the decode speeds of models of the same shape; 0 if there are no such models."""
    alike: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row.decode_tokens_per_s and row.weight_bytes is not None:
            shape = (row.parameters, row.weight_bytes, row.scheme, row.nonzero_share, row.engine, row.device, row.dtype)
            alike.setdefault(shape, []).append(row.decode_tokens_per_s)
    return max((max(speeds) / min(speeds) - 1 for speeds in alike.values()), default=0.0)


def _share_of(row: Row, teacher: Row) -> str:
    name, noun = ("weight_bytes", "bytes") if row.scheme else ("non_embedding_parameters", "non-embedding parameters")
    own, whole = figure(row, name), figure(teacher, name)
    return f"{percent(own / whole)} of the teacher's {noun}" if own is not None and whole else ""


def _speed(row: Row, teacher: Row) -> str:
    if row.lacks_speed:
        return "speed not measured (its kernel is simulated here)"
    own, whole, what = row.decode_tokens_per_s, teacher.decode_tokens_per_s, "decode speed"
    if not own and not whole and row.prefill_ms and teacher.prefill_ms:  # an encoder reads whole texts only
        own, whole, what = 1 / row.prefill_ms, 1 / teacher.prefill_ms, "speed"
    if not own or not whole:
        return "speed not measured"
    ratio = own / whole
    if abs(ratio - 1) <= EQUAL_SPEED:
        return f"no faster ({ratio:.2f}x its {what})"
    return f"{ratio:.2f}x its {what}" + (" (slower)" if ratio < 1 else "")


def _quality(row: Row, teacher: Row | None) -> str:
    for column in (BY_KEY[name] for name in OF_TASKS):
        if (value := figure(row, column.key)) is not None:
            unit = f" {column.unit}" if column.unit else ""
            whole = figure(teacher, column.key) if teacher is not None else None
            against = "" if whole is None else f" against {column.style(whole * column.scale)}{unit}"
            return f"{column.title[0].lower()}{column.title[1:]} {column.style(value * column.scale)}{unit}{against}"
    if row.perplexity is None:
        return "quality not measured"
    against = f" against {significant(teacher.perplexity)}" if teacher and teacher.perplexity is not None else ""
    return f"perplexity {significant(row.perplexity)}{against}"


def _closed(gap: Gap) -> str:
    share = gap.share or 0.0
    what = "the loss gap to the teacher" if gap.kind == "training" else "the loss that rounding alone adds"
    if share < 0:
        return f"training made {what} {percent(-share)} larger"
    verb = "closed" if gap.kind == "training" else "recovered"
    return f"training {verb} {'all' if share >= 1 else percent(share)} of {what}"
