"""Compares the figures of a finished run with the recipe's ``require`` section."""

from __future__ import annotations

from distill.core.errors import NotReached
from distill.reporting.require import outcomes
from distill.stages.evaluate.stored_rows import rows_of, scores_of
from distill.stages.session import Session


def check_required(session: Session) -> None:
    """Raise an error if a figure misses its bound; everything is saved by then.

    Raises:
        NotReached: with a line for each miss.
        InputError: a file of figures has changed since it was written.
    """
    if not session.require:
        return
    found = outcomes(session.require, rows_of(session.run, session.stages), scores_of(session.run, session.stages))
    if missed := [one.line for one in found if not one.reached]:
        raise NotReached("\n".join(missed))
    session.say(f"required and reached: {', '.join(one.key for one in found)}")
