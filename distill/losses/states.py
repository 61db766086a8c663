"""The second kind of loss: on what the models compute inside, layer by layer, where a teacher is there to be watched.

    loss of a token = mean over the pairs (student layer, teacher layer) of the loss of the pair

Beside a loss on predictions, never in its place: it says nothing to the last norm and the output head. It helps most
where the student is far from the teacher and tokens are few, and costs the memory of the layers it reads in both.

Which layer learns from which (``layers: auto``): a student that was cut out of the teacher learns layer by layer from
those that were kept; any other learns evenly over the teacher's depth, the last layer from the last,

    teacher layer = ceil((i + 1) * num_teacher / num_student) - 1    for student layer i from 0.

Source: Romero et al. 2014, arXiv 1412.6550 (hints from inner layers); Jiao et al. 2019, arXiv 1909.10351 (several
layers, mapped evenly); Muralidharan et al. 2024, arXiv 2407.14679 (beside the logits' loss, for a pruned student).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from distill.core.errors import InputError
from distill.losses.base import AnyLossSpec, LossTerm

if TYPE_CHECKING:
    from torch import Tensor

Layer = Annotated[int, Field(ge=0)]
Pair = tuple[int, int]
"""(student's layer, teacher's layer), from 0."""
Shape = tuple[int, int]
"""How a state's width is made up: (heads, channels of each); hidden states are one head."""


class StateLossSpec(AnyLossSpec):
    """A loss between what a layer of the student and one of the teacher put out, averaged over pairs of layers."""

    parts: ClassVar[tuple[str, ...]] = ("block",)
    """What is compared of a layer: its output ("block"), or projections of its attention; averaged too."""

    layers: Literal["auto", "last"] | tuple[tuple[Layer, Layer], ...] = "auto"
    """Which of the student's layers learn from which of the teacher's, from 0: auto maps every one (the pruning's own
    map, else evenly), last only the last to the last, [[0, 1], [3, 7]] is by hand."""

    def pairs(self, num_student: int, num_teacher: int, kept: Sequence[int] | None = None) -> tuple[Pair, ...]:
        """The pairs of layers that are compared.

        Args:
            num_student: layers of the student.
            num_teacher: layers of the teacher.
            kept: for each of the student's layers the one of the teacher that it was; None when it is not known.

        Raises:
            InputError: a layer that is not there, or named twice.
        """
        if isinstance(self.layers, str):
            whole = kept or [-(-(i + 1) * num_teacher // num_student) - 1 for i in range(num_student)]
            return tuple(enumerate(whole))[-1 if self.layers == "last" else 0 :]
        for pair in self.layers:
            for who, layer, size in zip(("student", "teacher"), pair, (num_student, num_teacher), strict=True):
                if layer >= size:
                    raise InputError(f"{self.kind}.layers: the {who} has no layer {layer} (expected 0 to {size - 1})")
        students = [layer for layer, _ in self.layers]
        if not students or len(set(students)) < len(students):
            raise InputError(f"{self.kind}.layers: name at least one pair and each of the student's layers once")
        return self.layers

    def between(self, student: Shape, teacher: Shape) -> Self:
        """This loss with all settled that depends on the shapes of the two states.

        Raises:
            InputError: it cannot be taken between them.
        """
        return self

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor) -> LossTerm:
        """The loss of one pair of states.

        Args:
            student: [batch, sequence, width]; 0 where ``mask`` is False.
            teacher: [batch, sequence, width], without graph; 0 where ``mask`` is False.
            mask: [batch, sequence], True where a prediction counts.
        """
        raise NotImplementedError


class HiddenLossSpec(StateLossSpec):
    """A loss between hidden states, which have to be of one width; :attr:`projection` sees to it."""

    projection: Literal["auto", "learned"] = "auto"
    """How the widths meet. auto: the channels that the pruning kept, as they are where widths are equal, else a linear
    map that is learned beside the student and dropped after the training; learned: always that."""


def refusal(losses: Iterable[AnyLossSpec]) -> str | None:
    """Why a cached teacher cannot teach these losses, as one line; None when it can."""
    for loss in losses:
        if isinstance(loss, StateLossSpec):
            return f"{loss.kind} reads the teacher's layers and a cache holds its output alone; name the teacher itself"
    return None
