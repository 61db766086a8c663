"""A stage to start from: it reads a model and writes down how many parameters it has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from distill.core.artifact import write_text
from distill.stages.base import StageSpec, View
from distill.stages.checks import check_task
from distill.stages.forecast import Forecast

if TYPE_CHECKING:
    from distill.stages.session import StageContext


class TemplateStage(StageSpec):
    """Count the parameters of a model."""

    kind: Literal["template_stage"] = "template_stage"
    model: str = "teacher"
    """What to count: "teacher", an earlier stage, a folder or a Hub id."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is counted."""
        return [(("model",), self.model)]

    def forecast(self, view: View) -> Forecast:
        """No model is made, and nothing is trained."""
        check_task(self, view)
        return Forecast(reads=self.reading(), does=["counts its parameters"])

    def run(self, context: StageContext) -> dict[str, Any]:
        """Count, and write."""
        from distill.models.size import measure_size
        from distill.stages.models import local_folder

        figures = {"parameters": measure_size(local_folder(context.session.artifact(self.model))).parameters}
        write_text(context.folder / "parameters.json", json.dumps(figures))
        return figures
