"""From the lineages of two models: where the student's layers and channels were in its teacher."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.pruning.origin import Origin
from distill.stages.prune import PLAN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill.stages.base import Session


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
    """(place, plan by which it was cut out of the next one) of a model, its parent and so on, as far as is known."""
    with suppress(InputError):  # an ancestor that is gone
        while True:
            artifact = session.artifact(reference)
            line, folder = artifact.lineage(), Path(artifact.location)
            cut = line is not None and line.kind == "prune"
            plan = folder.parent / PLAN if cut and (folder.parent / PLAN).is_file() else None
            yield str(folder.resolve()) if folder.is_dir() else artifact.location, plan
            if line is None or (cut and plan is None):
                return
            if reference in session.stages:
                reference = line.parent
            else:  # another run's: its stages are folders beside this one, and its teacher is the root of the line
                beside = folder.parent.parent / line.parent / folder.name
                reference = str(beside) if beside.is_dir() else line.base_model
