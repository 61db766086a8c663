"""Losses on hidden states, layer by layer. They need a live teacher, because a cache stores only its output.

    loss per token = mean over the pairs (student layer, teacher layer) of the loss of the pair

Use such a loss in addition to a loss on logits and not instead of it, because it does not train the last norm and the
output head. Minitron found it useful if many layers were removed, and a loss on logits alone better otherwise (arXiv
2407.14679, best practices 6 and 7). It costs memory: the hidden states of both models are kept for all layers that it
reads.

The pairs of layers (``layers: auto``): if the student was pruned from the teacher, each of its layers is compared with
the teacher layer from which it was copied. Otherwise the student's layers are distributed evenly over the teacher's
depth, and the last layer is compared with the last layer:

    teacher layer = ceil((i + 1) * num_teacher / num_student) - 1    for student layer i from 0.

Source: Romero et al. 2014, arXiv 1412.6550 (hints from hidden layers); Jiao et al. 2019, arXiv 1909.10351 (several
layers, evenly distributed); Muralidharan et al. 2024, arXiv 2407.14679 (in addition to a loss on logits, for a pruned
student, with one linear map for all layers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from distill.core.errors import InputError
from distill.losses.base import AnyLossSpec
from distill.numerics.term import LossTerm

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[int, int]
"""(student layer, teacher layer), counted from 0."""


def _one_of_the_forms(value: Any) -> Any:
    """Check the form of the value first, because a pydantic union reports a mistake once per form."""
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
"""(number of heads, channels per head) of a state; their product is its width. Hidden states have one head."""


class StateLossSpec(AnyLossSpec):
    """A loss between the outputs of a student layer and a teacher layer, averaged over the pairs of layers."""

    parts: ClassVar[tuple[str, ...]] = ("block",)
    """Tensors of a layer that are compared: its output ("block"), or projections of its attention. Their mean is
    used."""
    is_joint: ClassVar[bool] = False
    """Whether the parts are read together, side by side in one tensor, and not one after the other."""

    layers: Layers = "auto"
    """Pairs of a student layer and a teacher layer that are compared, counted from 0. auto: all layers of the student,
    paired with the teacher layers from which pruning copied them, or else evenly; last: only the last layers; [[0, 1],
    [3, 7]]: these pairs."""

    def pairs(self, num_student: int, num_teacher: int, kept: Sequence[int] | None = None) -> tuple[Pair, ...]:
        """The pairs of layers to compare.

        Args:
            num_student: number of layers of the student.
            num_teacher: number of layers of the teacher.
            kept: for each student layer, the index of the teacher layer from which it was copied; None if unknown.

        Raises:
            InputError: a layer does not exist.
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
        """A copy of this loss with all settings resolved that depend on the shapes of the two states.

        Raises:
            InputError: the loss cannot be computed between states of these shapes.
        """
        return self

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        documents: Tensor | None = None,
        *,
        is_causal: bool = True,
    ) -> LossTerm:
        """Compute the loss of one pair of states.

        Args:
            student: the student's state, [batch, sequence, width]; 0 where ``mask`` is False.
            teacher: the teacher's state, [batch, sequence, width], without a graph; 0 where ``mask`` is False.
            mask: [batch, sequence], True for the positions that are counted, or the weight of each position.
            documents: [batch, sequence], index of each token's document within its row, if attention is limited to the
                document; None if a token attends to all earlier tokens of its row.
            is_causal: whether a token attends to earlier tokens only; False for encoders, where it attends to all
                tokens of its row that count.
        """
        raise NotImplementedError


class HiddenLossSpec(StateLossSpec):
    """A loss between hidden states of equal width; :attr:`projection` says how states of other widths are projected."""

    projection: Literal["auto", "learned"] = "auto"
    """How states of different widths are compared. auto: directly if the widths are equal; in the channels that pruning
    kept, if they are known; else through a linear map, which is trained with the student and removed after the
    training. learned: always through such a map."""


def refusal(losses: Iterable[AnyLossSpec]) -> str | None:
    """The reason, in one line, why one of these losses cannot be trained from a cached teacher; None if all can."""
    for loss in losses:
        if isinstance(loss, StateLossSpec):
            return (
                f"{loss.kind} reads the teacher's hidden layers, and a cache stores only its output; use a live teacher"
            )
    return None
