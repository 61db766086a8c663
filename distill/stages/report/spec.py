"""The report of a run: gains and losses, on one page that opens in any browser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.stages.base import StageSpec, View
from distill.stages.checks import check_task, refuse_task
from distill.stages.forecast import Forecast

if TYPE_CHECKING:
    from distill.stages.session import StageContext

ANSWERS = "answers.json"
"""What the models answered: a list of {prompt, answers: {model: {text, ...}}}."""
PROMPTS = ("The ", "In the beginning", "def main(")
ASKED = ("What is the capital of France?", "Name three colours.", "Write a Python function that adds two numbers.")
"""Of models that learn from conversations, where the recipe asks nothing else."""


class Report(StageSpec):
    """Write index.html, report.md and table.csv from the run's measurements, and send them to W&B."""

    reads_files: ClassVar[bool] = True

    kind: Literal["report"] = "report"
    prompts: tuple[str, ...] = Field(PROMPTS)
    """Texts that the models continue greedily, side by side; empty: none. For chat models, each prompt is sent as a
    user message."""
    models: tuple[str, ...] = ()
    """Models that answer, and exports, each in its engine; empty: the teacher and every measured student that was
    trained."""
    new_tokens: int = Field(48, ge=1)
    """Largest number of tokens of an answer."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The models that are named."""
        return [(("models", i), reference) for i, reference in enumerate(self.models)]

    def reads(self, earlier: list[str]) -> list[str]:
        """Everything that stands before it."""
        return list(dict.fromkeys([*self.models, *earlier]))

    def forecast(self, view: View) -> Forecast:
        """The models that will answer."""
        if self.prompts and self.prompts != PROMPTS:
            refuse_task(view, "prompts")
        check_task(self, view)
        return Forecast(reads="reads what was measured", does=[reading] if (reading := self.reading()) else [])

    def rehearse(self, context: StageContext) -> None:
        """Look for figures, draw a plot with the names that will be shown, and cut the prompts into tokens."""
        from distill.stages.rehearsal import check_prompts, rehearse_plots

        stages = context.session.stages
        before = list(stages)[: list(stages).index(context.name)]
        if not any(stages[name].kind == "evaluate" for name in before):
            raise InputError("there is nothing to report: no evaluate stage stands before this one")
        check_prompts(context, self.prompts if context.session.data.task.is_causal else ())
        rehearse_plots(dict.fromkeys(name for stage in stages.values() for _, name in stage.references()))

    def vocabulary_of(self) -> str | None:
        """It shows the run's text, and models answer in their own tokens."""
        return None

    def shown(self, figures: dict[str, Any]) -> str | None:
        """The page."""
        return str(figures["page"])
