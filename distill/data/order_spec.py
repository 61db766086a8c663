"""The `data.order` section of a recipe: which rows a training reads first."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill.core.spec import Spec

UNTIL = 0.3


class OrderSpec(Spec):
    """Easy rows first, then the usual order (a curriculum). The rows of the training stay the same."""

    by: Literal["length", "teacher_loss"]
    """How the difficulty of a row is measured. length: tokens of the longest document in it; teacher_loss: the mean
    loss of the stage's teacher on the tokens that are learned from."""
    until: float = Field(UNTIL, gt=0, le=1)
    """Share of each training, from its beginning, in which rows are sorted from easy to hard."""
