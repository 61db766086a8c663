"""A student learns from a frozen teacher's distributions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from distill.models.lora import LoraSpec
from distill.stages.base import SELF, StageContext, StageSpec
from distill.stages.finetune import starting_model
from distill.stages.train import check_own_teacher
from distill.training.spec import DistillSpec


class Distill(DistillSpec, StageSpec):
    """Train a student on the teacher's logits."""

    makes_model: ClassVar[bool] = True

    kind: Literal["distill"] = "distill"
    student: str
    """What to train: an earlier stage, a folder or a Hub id."""
    teacher: str = "teacher"
    """Whom to learn from: "teacher", an earlier stage (a corrected teacher, a cache), a folder, a Hub id, or "self":
    the student as it starts, at no memory (needs lora)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random: keep the student's architecture, forget its weights (a control)."""
    lora: LoraSpec | None = None
    """Train adapters instead of the weights; merged before the model is written. Unset is off."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the stored weights; auto is that of the student it starts from."""

    @model_validator(mode="after")
    def _own_teacher(self) -> Distill:
        check_own_teacher(self.teacher, self.lora, silent=all(loss.needs_teacher for loss in self.losses))
        return self

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Student and teacher."""
        return [(("student",), self.student), *([(("teacher",), self.teacher)] if self.teacher != SELF else [])]

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train, then write the student."""
        from distill.stages.train import hold_mask, save_plain, stored_dtype_of, train
        from distill.training.assemble import assemble, disassemble

        start = starting_model(context, self.student, self.weights)
        dtype = stored_dtype_of(context.session.artifact(self.student).location, self.save_dtype)
        pretrained = self.weights == "pretrained"
        mask = hold_mask(context, self.student, start, lora=self.lora is not None) if pretrained else None
        student = assemble(start, lora=self.lora, gradient_checkpointing=context.session.compute.gradient_checkpointing)
        figures = train(context, student, self.losses, self, teacher=self.teacher, start=self.student)
        context.write_model(
            save_plain(disassemble(student), dtype),
            kind=self.kind,
            parent=self.student,
            teacher=context.session.teacher_behind(self.student if self.teacher == SELF else self.teacher),
            figures=figures,
            mask=mask,
        )
        return figures
