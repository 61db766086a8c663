"""Checks of tasks before a run and before its first stage, for all stages that use tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from distill.core.errors import InputError
from distill.evaluation.tasks.base import TaskSpec


def check_tasks(tasks: Mapping[str, TaskSpec], key: str) -> None:
    """Check that the files and packages that tasks need are there.

    Args:
        tasks: tasks by name.
        key: key in the recipe, such as ``"tasks"``.

    Raises:
        InputError: something is missing; the error names the task.
    """
    for name, task in tasks.items():
        with _named(f"{key}.{name}"):
            task.check()


def rehearse_tasks(tasks: Mapping[str, TaskSpec], key: str, *, has_template: bool) -> None:
    """Make all questions and right answers once, so that errors in them are found before models are trained.

    Args:
        tasks: tasks by name.
        key: key in the recipe.
        has_template: whether the run's tokenizer has a chat template.

    Raises:
        InputError: a question cannot be made; the error names the task.
    """
    for name, task in tasks.items():
        with _named(f"{key}.{name}"):
            if task.chat_template and not has_template:
                raise InputError("chat_template: true, but the run's tokenizer has no chat template; remove it")
            task.rehearse(name)


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
