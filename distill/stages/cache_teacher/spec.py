"""The teacher's output on the training text, computed once and stored on disk for any number of students.

A cache belongs to a teacher and a text. The stages that use it may differ in student, order, batch size, packing and
devices, and need neither the time nor the memory of a teacher. The validation text is cached too, always as hidden
states, so that the validation's KL is the exact one whatever the codec.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distill.data.teacher_cache import CODECS, TopK
from distill.data.teacher_cache.base import CodecSpec
from distill.losses import LossSpec, layer_losses
from distill.losses.sparse import refusal
from distill.stages.base import StageSpec, View
from distill.stages.checks import check_task, refuse_task
from distill.stages.forecast import Forecast, Signal
from distill.stages.text import ReadsText
from distill.training.spec import DistillSpec

if TYPE_CHECKING:
    from distill.data.spec import DataSpec
    from distill.stages.session import StageContext

NO_STREAM = (
    "a stream has no positions that a cache could belong to; store its text first (streaming: false, or a file), or "
    "learn from the teacher itself"
)


class CacheTeacher(ReadsText):
    """Store the teacher's output on the training text, to train students without the teacher in memory."""

    makes_signal: ClassVar[bool] = True

    kind: Literal["cache_teacher"] = "cache_teacher"
    teacher: str = "teacher"
    """Teacher: "teacher", an earlier stage (a corrected teacher), a folder or a Hub id."""
    codec: Annotated[CodecSpec, CODECS] = TopK()
    """Codec: how much of each distribution is stored."""
    num_sequences: int | None = Field(None, ge=1)
    """Number of training rows to cache, from the start of the training order; unset: all that the stages of this recipe
    use."""
    window: int | None = Field(None, ge=2)
    """Number of tokens that the teacher reads at once; unset: that of the cache in `folder`, if there is one, else
    data.sequence_length."""
    batch_size: int = Field(8, ge=1)
    """Number of sequences per forward pass of the teacher."""
    folder: str | None = None
    """Folder of the cache, to share it between runs; unset: the run's data folder, under a name with its hash."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The teacher."""
        return [(("teacher",), self.teacher)]

    def mistakes(self, data: DataSpec) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Text without positions."""
        if data.train.is_stream():
            yield (), NO_STREAM

    def refuses(self, name: str, student: StageSpec) -> str | None:
        """Losses that need more than it holds, and sequences of which it holds nothing."""
        if student.makes_signal:
            return f"{name!r} is a cache already; name its teacher"
        if not isinstance(student, DistillSpec):
            return None
        if student.teacher_reads == "document":
            return (
                f"{name!r} holds what its teacher says of the student's own text, without documents; name its teacher "
                "here, whose output is kept in memory between passes"
            )
        if why := layer_losses.refusal(student.losses):
            return why
        on_logits = [loss for loss in student.losses if isinstance(loss, LossSpec)]
        if not self.codec.whole and (why := refusal(on_logits)):
            return why
        if student.on_policy is None:
            return None
        return (
            f"{name!r} holds what its teacher says of the text, and on_policy asks about sequences that do not exist "
            "yet; name its teacher here, or remove on_policy"
        )

    def forecast(self, view: View) -> Forecast:
        """How much is written down of which sequences, and for whom that may not be enough."""
        refuse_task(view, "cache_teacher", "name the teacher itself, which is small")
        check_task(self, view)
        config = view.config(self.teacher) or {}
        signal = Signal(
            self.teacher,
            needs_head=self.codec.reads == "hidden",
            bytes_per_token=self.codec.bytes_per_token(config["vocab_size"], config["hidden_size"])
            if {"vocab_size", "hidden_size"} <= config.keys()
            else None,
            max_tokens=None if self.num_sequences is None else self.num_sequences * view.data.sequence_length,
        )
        return Forecast(self.reading(), [self._holds(view)], signal=signal)

    def rehearse(self, context: StageContext) -> None:
        """Compare the teacher's tokens with the run's."""
        from distill.stages.rehearsal import check_outside

        check_outside(context, self.teacher)

    def _holds(self, view: View) -> str:
        """What is written down, and for whom that may be too few (the text may hold less)."""
        if self.num_sequences is None:
            return f"{self.codec.kind} of all sequences that later stages take"
        taken: dict[str, int] = {}
        for name, stage in view.stages.items():
            if isinstance(stage, DistillSpec) and stage.teacher_named() == view.name:
                taken[name] = 0 if stage.num_epochs else stage.steps(view.data.sequence_length) * stage.batch_size
        few = ", ".join(f"{name} takes {count:,}" for name, count in taken.items() if count > self.num_sequences)
        warning = f" - too few if the text has more: {few}; raise num_sequences or leave it unset" if few else ""
        return f"{self.codec.kind} of {self.num_sequences:,} sequences{warning}"
