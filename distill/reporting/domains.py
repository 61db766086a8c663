"""Quality source by source, where the text of a run is a mixture: a row per source, and which of them is the worst."""

from __future__ import annotations

from collections.abc import Sequence

from distill.core.markdown import escaped
from distill.reporting.tables import MISSING, significant, teacher_first
from distill.reporting.tradeoff import Domain, Row
from distill.reporting.verdict import main_student

KEYS = ("tokens", "perplexity", "loss_nats", "bits_per_byte", "kl_to_teacher", "top1_agreement")


def domain_table(rows: Sequence[Row]) -> list[list[str]]:
    """Headings, then a row per source: of each model its bits per byte, and its KL to the teacher where it has one.

    Empty where no model was measured source by source.
    """
    measured = [row for row in teacher_first(rows) if row.domains]
    names = list(dict.fromkeys(domain.name for row in measured for domain in row.domains))
    if not names:
        return []
    headings, columns = ["Source", "Predictions"], []
    for row in measured:
        headings.append(f"{row.name}, bits per byte")
        columns.append((row, "bits_per_byte"))
        if row.role != "teacher":
            headings.append(f"{row.name}, KL [nats/token]")
            columns.append((row, "kl_to_teacher"))
    lines = []
    for name in names:
        tokens = next(domain.tokens for row in measured for domain in row.domains if domain.name == name)
        lines.append([name, f"{tokens:,}", *(_cell(_of(row, name), key) for row, key in columns)])
    return [headings, *lines]


def worst_domain(rows: Sequence[Row]) -> str | None:
    """A sentence that names the source on which the main student is worst; None where there are not two to compare.

    By the KL to the teacher. Without a teacher by bits per byte, which also say how hard a text is.
    """
    student = main_student([row for row in rows if row.domains])
    if student is None or len(student.domains) < 2:
        return None
    key, unit = "kl_to_teacher", "nats per token"
    if any(domain.kl_to_teacher is None for domain in student.domains):
        key, unit = "bits_per_byte", "bits per byte"
    known = [(value, domain.name) for domain in student.domains if (value := getattr(domain, key)) is not None]
    if len(known) < 2:
        return None
    (most, worst), others = max(known), sorted(known)[:-1]
    what = "is furthest from the teacher on" if key == "kl_to_teacher" else "predicts worst"
    rest = ", ".join(f"{name} {value:.3f}" for value, name in others)
    return f"{student.name} {what} {worst}: {most:.3f} {unit} ({rest})."


def domain_figures(rows: Sequence[Row]) -> dict[str, float]:
    """``model/source/column`` -> every figure of a source that was measured, at full precision."""
    found = {f"{row.name}/{one.name}/{key}": getattr(one, key) for row in rows for one in row.domains for key in KEYS}
    return {key: value for key, value in found.items() if value is not None}


def domain_markdown(rows: Sequence[Row]) -> str:
    """The table, and the sentence behind it; empty where there is none."""
    lines = domain_table(rows)
    if not lines:
        return ""
    table = ["| " + " | ".join(map(escaped, cells)) + " |" for cells in lines]
    table.insert(1, "|---" + "|---:" * (len(lines[0]) - 1) + "|")
    worst = worst_domain(rows)
    return "\n".join(table) + (f"\n\n{escaped(worst)}" if worst else "")


def _of(row: Row, name: str) -> Domain | None:
    return next((domain for domain in row.domains if domain.name == name), None)


def _cell(domain: Domain | None, key: str) -> str:
    value = None if domain is None else getattr(domain, key)
    if value is None:
        return MISSING
    return f"{value:.3f}" if key == "kl_to_teacher" else significant(value)
