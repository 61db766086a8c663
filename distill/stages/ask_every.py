"""Tasks that are evaluated during training, for curves of accuracy in addition to the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from distill.core.errors import InputError
from distill.core.spec import NAME, Spec
from distill.evaluation.tasks import TASKS, TaskSpec
from distill.evaluation.tasks.base import LanguageModel
from distill.evaluation.tasks.task_checks import check_tasks, rehearse_tasks

if TYPE_CHECKING:
    from distill.stages.base import View
    from distill.stages.session import StageContext

KEY = "task/"
"""Begins the column of a task in the metrics."""
TASKS_KEY = "evaluate_every.tasks"


class AskEvery(Spec):
    """Tasks that are evaluated during training, and how often."""

    num_steps: int = Field(ge=1)
    """Number of optimizer steps between two evaluations; there is one after the last step too."""
    tasks: dict[Annotated[str, Field(pattern=NAME)], Annotated[TaskSpec, TASKS]] = Field(min_length=1)
    """Tasks by name, as in an evaluate stage. A few hundred questions show a trend; each choice is a forward pass."""

    def ask(self, lm: LanguageModel) -> dict[str, float]:
        """Column of the metrics -> accuracy, of each task."""
        found = {}
        for name, task in self.tasks.items():
            rights = task.ask(lm, name).rights()
            found[f"{KEY}{name}"] = sum(rights) / len(rights)
        return found

    def rehearse(self, context: StageContext) -> None:
        """Make every question once, so that what is wrong with one is found before the training.

        Raises:
            InputError: with the task's name.
        """
        rehearse_tasks(self.tasks, TASKS_KEY, has_template=bool(context.session.tokenizer().chat_template))


def check_asked(asked: AskEvery | None, view: View) -> None:
    """Refuse what cannot be asked while a model trains.

    Raises:
        InputError: a file is not there, a package is missing, or the model is sharded.
    """
    if asked is None:
        return
    if view.compute.strategy == "fsdp":
        raise InputError("evaluate_every: the model is sharded (compute.strategy: fsdp) and cannot be asked; use ddp")
    check_tasks(asked.tasks, TASKS_KEY)
    for name, task in asked.tasks.items():
        if (missing := task.missing()) is not None:
            raise InputError(f"{TASKS_KEY}.{name}: {missing}")
