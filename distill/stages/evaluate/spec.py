"""Size, speed, memory and quality of every model of a run, measured from the artifacts on disk."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.errors import InputError
from distill.core.spec import NAME, Spec
from distill.data.files import File
from distill.evaluation.tasks import TASKS, TaskSpec
from distill.evaluation.tasks.task_checks import check_tasks, rehearse_tasks
from distill.reporting.tables import COLUMNS
from distill.reporting.tradeoff import SPEED, Role
from distill.stages.base import View
from distill.stages.checks import check_task, refuse_task
from distill.stages.evaluate.stored_rows import ROWS
from distill.stages.forecast import Forecast
from distill.stages.text import ReadsText

if TYPE_CHECKING:
    from distill.stages.session import StageContext


class SpeedSpec(Spec):
    """How speed is measured; the same for every model."""

    prompt_tokens: int = Field(128, ge=1)
    """Number of tokens of the prompt (prefill)."""
    contexts: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """More prompt lengths to measure, with each batch size; the report shows the grid."""
    new_tokens: int = Field(64, ge=1)
    """Number of tokens to generate (decode)."""
    repeats: int = Field(5, ge=1)
    """Number of measurements per round, after a warm-up."""
    rounds: int = Field(3, ge=1)
    """Number of rounds. In each round all models are measured in turn, each in a new process; each model's least
    disturbed round counts."""
    batch_size: int = Field(1, ge=1)
    """Number of sequences per batch."""
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """More batch sizes to measure, with each prompt length."""
    timeout_s: float = Field(600, gt=0)
    """Largest number of seconds for the measurement of one model."""

    def grid(self) -> tuple[tuple[int, int], ...]:
        """Every (batch size, length of the prompt)."""
        return tuple(product((self.batch_size, *self.batch_sizes), (self.prompt_tokens, *self.contexts)))


class Evaluate(ReadsText):
    """Measure models, and exports in their engines: quality and size; speed and memory in one process per model."""

    reads_files: ClassVar[bool] = True

    kind: Literal["evaluate"] = "evaluate"
    models: tuple[str, ...] = ()
    """Models and exports to measure. An export is measured in its engine, beside the teacher's own file in the same
    precision. Empty: the teacher, and every model and export of the earlier stages."""
    controls: tuple[str, ...] = ()
    """Models that serve only as controls. They are measured in addition to `models`."""
    teacher: str = "teacher"
    """Model that the others are compared with; not read in a recipe without a teacher."""
    batch_size: int = Field(8, ge=1)
    """Number of validation sequences per forward pass."""
    speed: SpeedSpec | None = SpeedSpec()
    """How speed is measured; null: not measured."""
    tasks: dict[Annotated[str, Field(pattern=NAME)], Annotated[TaskSpec, TASKS]] = Field({})
    """Tasks by name: questions with right answers that every model is asked, such as arc_easy: {kind: multiple_choice,
    path: arc_easy.jsonl, limit: 500}."""

    @model_validator(mode="after")
    def _tasks_are_no_columns(self) -> Evaluate:
        if taken := [name for name in self.tasks if name in {column.key for column in COLUMNS}]:
            raise ValueError(f"tasks: {taken[0]} is the name of a column of the table; call the task otherwise")
        return self

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The models that are named."""
        named = [(("models", i), reference) for i, reference in enumerate(self.models)]
        named += [(("controls", i), reference) for i, reference in enumerate(self.controls)]
        return [*named, *([(("teacher",), self.teacher)] if self.teacher != "teacher" else [])]

    def reads(self, earlier: list[str]) -> list[str]:
        """Those that are named, or all."""
        return list(dict.fromkeys([self.teacher, *(self.models or earlier), *self.controls]))

    def result(self, figures: dict[str, Any]) -> str:
        """The rows."""
        return ROWS

    def files(self) -> list[File]:
        """Those of the tasks."""
        return list(dict.fromkeys(file for task in self.tasks.values() for file in task.files()))

    def measures(self) -> list[str]:
        """The columns of its table, and the tasks."""
        left_out = SPEED if self.speed is None else ()
        return [*(column.key for column in COLUMNS if column.key not in left_out), *self.tasks]

    def asks(self) -> Mapping[str, TaskSpec]:
        """Those of the recipe."""
        return self.tasks

    def measured_models(self, earlier: list[str]) -> list[str]:
        """Teacher, models and controls."""
        return [self.teacher, *(self.models or earlier), *self.controls]

    def missing(self) -> str | None:
        """What a task needs."""
        pairs = ((name, task.missing()) for name, task in self.tasks.items())
        return next((f"tasks.{name}: {missing}" for name, missing in pairs if missing is not None), None)

    def outdated(self, figures: dict[str, Any]) -> str | None:
        """The engine of an export was not installed, and is now."""
        found = [module for module in figures.get("not_installed", ()) if find_spec(module) is not None]
        return f"made again, as {found[0]} is installed now" if found else None

    def forecast(self, view: View) -> Forecast:
        """Which models it measures, and what they are asked."""
        check_task(self, view, also=self._read(view))
        if self.tasks:
            refuse_task(view, "tasks")
        check_tasks(self.tasks, "tasks")
        self._check_contexts(view)
        limits = {name: f", {task.limit:,} questions" if task.limit else "" for name, task in self.tasks.items()}
        asked = [f"asks {name} ({task.kind}{limits[name]})" for name, task in self.tasks.items()]
        reads = self.reading() if self.models else "measures every model before it"
        return Forecast(reads=reads, does=asked)

    def _read(self, view: View) -> list[str]:
        """The models that will be measured."""
        return self.reads([name for name in view.known if name != "teacher"])

    def _check_contexts(self, view: View) -> None:
        """Refuse prompts that are longer than what a model can read, before any quality is measured."""
        if self.speed is None or not self.speed.contexts:
            return
        wanted = max(self.speed.contexts) + self.speed.new_tokens
        for reference in self._read(view):
            positions = (view.config(reference) or {}).get("max_position_embeddings")
            if isinstance(positions, int) and wanted > positions:
                raise InputError(
                    f"speed.contexts: {max(self.speed.contexts):,} tokens and {self.speed.new_tokens:,} new ones are "
                    f"more than the {positions:,} positions of {reference}; lower one of them"
                )

    def rehearse(self, context: StageContext) -> None:
        """Compare the models' tokens with the run's, and read the text, on which something must be there to measure."""
        from distill.stages.rehearsal import check_outside

        taught = [self.teacher] if self.teacher != "teacher" or context.session.teacher is not None else []
        check_outside(context, *taught, *self.models, *self.controls)
        if not context.session.awaits_rows:
            context.session.corpus()
        rehearse_tasks(self.tasks, "tasks", has_template=bool(context.session.tokenizer().chat_template))

    def vocabulary_of(self) -> str | None:
        """Each model is measured in its own tokens."""
        return None

    def role(self, reference: str) -> Role:
        """What a model is in the comparison."""
        if reference == self.teacher:
            return "teacher"
        return "control" if reference in self.controls else "student"
