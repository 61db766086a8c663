"""A student learns from a frozen teacher's distributions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from distill.models.lora import LoraSpec
from distill.pruning.layout import Config
from distill.stages.ask_every import AskEvery, check_asked
from distill.stages.base import SELF, View
from distill.stages.checks import (
    check_documents,
    check_ends,
    check_own_teacher,
    check_sizes,
    check_states,
    check_task,
    note_on_ends,
    refuse_task,
)
from distill.stages.forecast import Forecast, Training
from distill.stages.heads import with_task
from distill.stages.passes import say_passes
from distill.stages.text import ReadsText
from distill.training.spec import DistillSpec

if TYPE_CHECKING:
    from distill.stages.session import StageContext


class Distill(DistillSpec, ReadsText):
    """Train a student on the teacher's logits."""

    makes_model: ClassVar[bool] = True

    kind: Literal["distill"] = "distill"
    student: str
    """Model to train: an earlier stage, a folder or a Hub id."""
    teacher: str = "teacher"
    """Teacher: "teacher", an earlier stage (a corrected teacher, a cache), a folder, a Hub id, or "self": the student
    before training, which needs no additional memory (requires lora)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random: keep the student's architecture and initialise its weights randomly (a control)."""
    lora: LoraSpec | None = None
    """Train LoRA adapters instead of the weights. They are merged before the model is written. Unset is off."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the stored weights; auto is that of the student before training."""
    evaluate_every: AskEvery | None = None
    """Evaluate tasks during training, {num_steps: 200, tasks: {...}}, for curves of accuracy in addition to the loss;
    unset is off."""

    @model_validator(mode="after")
    def _own_teacher(self) -> Distill:
        alike = self.teacher_reads == "text" and all(loss.needs_teacher for loss in self.losses)
        check_own_teacher(self.teacher, self.lora, silent=alike)
        return self

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Student and teacher."""
        return [(("student",), self.student), *([(("teacher",), self.teacher)] if self.teacher != SELF else [])]

    def same_tokens(self) -> list[tuple[tuple[str | int, ...], str]]:
        """All but a student whose weights are forgotten, which may learn any."""
        forgets = self.weights == "random"
        return [pair for pair in self.references() if not (forgets and pair[0] == ("student",))]

    def forecast(self, view: View) -> Forecast:
        """The student, trained."""
        return replace(
            with_task(view.of_model(self.student, self._check), view),
            reads=self.reading(),
            does=self.in_words(view.data.sequence_length, view.data.packing),
            training=Training(self, self.losses, None if self.teacher == SELF else self.teacher, self.lora),
            notes=[] if self.teacher == SELF or self.on_policy else note_on_ends(self.student, self.teacher, view),
        )

    def _check(self, view: View, config: Config | None) -> None:
        check_sizes(self, view, config)
        check_task(self, view, starts=["student"])
        if self.lora is not None:
            refuse_task(view, "lora")
        if self.evaluate_every is not None:
            refuse_task(view, "evaluate_every")
        check_states(self.losses, view, self.student, self.teacher)
        check_ends(self, self, view)
        check_documents(self, view)
        check_asked(self.evaluate_every, view)

    def rehearse(self, context: StageContext) -> None:
        """Compare the models' tokens with the run's; write a model folder without weights."""
        from distill.stages.rehearsal import check_outside, rehearse_model

        check_outside(context, self.student, tokens=self.weights == "pretrained")
        check_outside(context, self.teacher)
        if self.evaluate_every is not None:
            self.evaluate_every.rehearse(context)
        rehearse_model(context, self.student)
        say_passes(context, self)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train, then write the student."""
        from distill.stages.train import train_and_write

        return train_and_write(
            context,
            self,
            self.student,
            self.losses,
            teacher=self.teacher,
            weights=self.weights,
            lora=self.lora,
            save_dtype=self.save_dtype,
            evaluate_every=self.evaluate_every,
        )
