"""The second kind of loss: on what the models compute inside, layer by layer, where a teacher is there to be watched.

    loss of a token = mean over the pairs (student layer, teacher layer) of the loss of the pair

Beside a loss on predictions, never in its place: it says nothing to the last norm and the output head. Minitron found
it worth its price where many layers were cut, and the logits alone best otherwise (arXiv 2407.14679, best practices 6
and 7). The price: the states that are read stay in memory, of both models.

Which layer learns from which (``layers: auto``): a student that was cut out of the teacher learns layer by layer from
those that were kept; any other learns evenly over the teacher's depth, the last layer from the last,

    teacher layer = ceil((i + 1) * num_teacher / num_student) - 1    for student layer i from 0.

Source: Romero et al. 2014, arXiv 1412.6550 (hints from inner layers); Jiao et al. 2019, arXiv 1909.10351 (several
layers, mapped evenly); Muralidharan et al. 2024, arXiv 2407.14679 (beside the logits' loss, for a pruned student, with
one linear map for all layers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from distill.core.errors import InputError
from distill.losses.base import AnyLossSpec, LossTerm

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[int, int]
"""(student's layer, teacher's layer), from 0."""


def _one_of_the_forms(value: Any) -> Any:
    """The union alone would report a mistake once for each form."""
    if isinstance(value, list | tuple):
        good = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
        good = good and all(type(layer) is int and layer >= 0 for pair in value for layer in pair)
        good = good and 0 < len(value) == len({pair[0] for pair in value})
    else:
        good = value in ("auto", "last")
    if not good:
        raise PydanticCustomError(
            "layers", "needs auto, last, or pairs such as [[0, 1], [3, 7]] with each of the student's layers once"
        )
    return value


Layers = Annotated[Literal["auto", "last"] | tuple[Pair, ...], BeforeValidator(_one_of_the_forms)]
Shape = tuple[int, int]
"""How a state's width is made up: (heads, channels of each); hidden states are one head."""


class StateLossSpec(AnyLossSpec):
    """A loss between what a layer of the student and one of the teacher put out, averaged over pairs of layers."""

    parts: ClassVar[tuple[str, ...]] = ("block",)
    """What is compared of a layer: its output ("block"), or projections of its attention; averaged too."""

    layers: Layers = "auto"
    """Which of the student's layers learn from which of the teacher's, from 0: auto maps every one (the pruning's own
    map, else evenly), last only the last to the last, [[0, 1], [3, 7]] is by hand."""

    def pairs(self, num_student: int, num_teacher: int, kept: Sequence[int] | None = None) -> tuple[Pair, ...]:
        """The pairs of layers that are compared.

        Args:
            num_student: layers of the student.
            num_teacher: layers of the teacher.
            kept: for each of the student's layers the one of the teacher that it was; None when it is not known.

        Raises:
            InputError: a layer that is not there.
        """
        if isinstance(self.layers, str):
            whole = kept or [-(-(i + 1) * num_teacher // num_student) - 1 for i in range(num_student)]
            return tuple(enumerate(whole))[-1 if self.layers == "last" else 0 :]
        for pair in self.layers:
            for who, layer, size in zip(("student", "teacher"), pair, (num_student, num_teacher), strict=True):
                if layer >= size:
                    raise InputError(f"{self.kind}.layers: the {who} has no layer {layer} (expected 0 to {size - 1})")
        return self.layers

    def between(self, student: Shape, teacher: Shape) -> Self:
        """This loss with all settled that depends on the shapes of the two states.

        Raises:
            InputError: it cannot be taken between them.
        """
        return self

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, documents: Tensor | None = None) -> LossTerm:
        """The loss of one pair of states.

        Args:
            student: [batch, sequence, width]; 0 where ``mask`` is False.
            teacher: [batch, sequence, width], without graph; 0 where ``mask`` is False.
            mask: [batch, sequence], True where a prediction counts.
            documents: [batch, sequence], a number for each of the documents of a row that do not see each other; None
                where a token sees all before it.
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
