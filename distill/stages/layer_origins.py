"""From the lineages of two models: where the student's layers and channels were in its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distill.core.artifact import LINEAGE, Artifact
from distill.core.errors import InputError
from distill.pruning.origin import PLAN, Origin
from distill.stages.session import Session


def origin_of(session: Session, student: str, teacher: str) -> Origin | None:
    """Where a student was cut out of its teacher, in one stage or several, whatever has trained either of them since.

    A teacher that was corrected before or after the cut, or a model that it was corrected from, is the same to this:
    training moves no layer and no channel.

    Args:
        session: whose stages the references may name.
        student: reference of the model that is trained.
        teacher: reference of the model that it learns from.

    Returns:
        None when nothing was cut between the two, or when that cannot be told.
    """
    same = set()
    for place, plan in _line(session, teacher):
        same.add(place)
        if plan is not None:
            break
    origin = None
    for place, plan in _line(session, student):
        if place in same:
            return origin
        if plan is not None:
            cut = Origin.read(plan)
            origin = cut if origin is None else cut.cut_again(origin)
    return None


def _line(session: Session, reference: str) -> Iterator[tuple[str, Path | None]]:
    """(place, plan by which it was cut out of the next one) of a model, its parent and so on, as far as is known.

    Raises:
        InputError: the lineage or the plan of a stage has changed since it was finished.
    """
    while True:
        reference = session.teacher_behind(reference)
        is_stage = reference in session.stages
        if is_stage and (session.run.stage(reference) / "model" / LINEAGE).exists():
            session.run.check(reference, f"model/{LINEAGE}")
        try:
            artifact = session.artifact(reference)
            line, folder = artifact.lineage(), Path(artifact.location)
        except InputError:  # an ancestor that is gone
            return
        plan: Path | None = None
        if line is not None and line.kind == "prune":
            plan = session.run.result(reference, PLAN) if is_stage else folder.parent / PLAN
            if plan is None or not plan.is_file():
                yield _place(artifact), None
                return
        yield _place(artifact), plan
        if line is None:
            return
        if is_stage:
            reference = line.parent
        else:  # another run's: its stages are folders beside this one, and its teacher is the root of the line
            beside = folder.parent.parent / line.parent / folder.name
            reference = str(beside) if beside.is_dir() else line.base_model


def _place(artifact: Artifact) -> str:
    return str(artifact.folder.resolve()) if artifact.folder is not None else artifact.location
