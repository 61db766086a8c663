"""What training for a task makes of a model: one with the head of the task."""

from __future__ import annotations

from dataclasses import replace

from distill.models.head_names import named_head, with_head
from distill.stages.base import View
from distill.stages.forecast import Forecast


def with_task(forecast: Forecast, view: View) -> Forecast:
    """The forecast of a stage that trains a model, with the head that the model gets.

    Args:
        forecast: of the stage.
        view: of the stage.
    """
    task = view.data.task
    if task.is_causal:
        return forecast
    known = getattr(task, "classes", None)
    num_classes = 1 if task.kind == "regression" else None if known is None else len(known)
    makes = [
        config if named_head(config) == task.head else with_head(config, task.head, num_classes)
        for config in forecast.makes
    ]
    return replace(forecast, makes=makes)
