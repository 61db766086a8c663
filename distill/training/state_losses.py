"""Losses on inner states in training: which layers meet, how their widths are brought together, and the sum of them.

What is learned for it (a linear map a loss) is trained, saved and resumed with the student and is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill.losses import LossTerm, StateLossSpec
from distill.losses.schedule import number
from distill.losses.states import HiddenLossSpec
from distill.models.states import State, States, pairs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.pruning.origin import Origin


class StateLosses(nn.Module):
    """The losses of a run that read inner states. The models stay outside its module tree.

    Args:
        losses: those on inner states.
        student: is trained.
        teacher: is not.
        origin: where the student's layers and channels were in the teacher; None when it was not cut out of it.

    Attributes:
        student: the student's states; record them in its forward pass.
        teacher: the same of the teacher, which may be the same model.
        widths: channels of the hidden states, the student's and the teacher's.
        pairs: kind of a loss -> (student's layer, teacher's layer).
        projections: kind of a loss -> linear map from the student's channels to the teacher's, where one is learned.

    Raises:
        InputError: a loss that these two models cannot serve.
    """

    def __init__(
        self,
        losses: Sequence[StateLossSpec],
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        origin: Origin | None = None,
    ):
        super().__init__()
        self.channels: Tensor | None
        self.student, self.teacher = States(student), States(teacher)
        shapes = (self.student.shapes, self.teacher.shapes)
        self.widths = tuple(one.hidden_size for one in shapes)
        size = (shapes[0].num_layers, self.widths[0])
        if origin is not None and (len(origin.layers), len(origin.hidden_channels)) != size:
            raise ValueError(f"{origin} is that of another student than one of {size[0]} layers x {size[1]} channels")
        self.pairs = {loss.kind: pairs_of(loss, *shapes, origin.layers if origin else None) for loss in losses}
        self.projections = nn.ModuleDict()
        channels = torch.tensor(origin.hidden_channels) if origin and self.widths[0] != self.widths[1] else None
        self.register_buffer("channels", channels, persistent=False)
        for loss in losses:
            self._prepare(loss)

    def _prepare(self, loss: StateLossSpec) -> None:
        for side, states in enumerate((self.student, self.teacher)):
            states.watch((part, pair[side]) for pair in self.pairs[loss.kind] for part in loss.parts)
        meet = self.channels is not None or self.widths[0] == self.widths[1]
        if isinstance(loss, HiddenLossSpec) and (loss.projection == "learned" or not meet):
            self.projections[loss.kind] = self._linear()

    def _linear(self) -> nn.Linear:
        """From the student's channels to the teacher's; starts with those known to meet, else as a rotation."""
        linear = nn.utils.skip_init(nn.Linear, *self.widths, bias=False)
        if self.channels is not None:
            nn.init.zeros_(linear.weight).data[self.channels, torch.arange(len(self.channels))] = 1.0
        elif self.widths[0] == self.widths[1]:
            nn.init.eye_(linear.weight)
        else:  # a generator of its own: no other random number moves because of a loss
            nn.init.orthogonal_(linear.weight, generator=torch.Generator().manual_seed(0))
        return linear

    def forward(
        self, batch: dict[str, Tensor], losses: Sequence[tuple[str, StateLossSpec]]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """The weighted sum of the losses over the recorded batch, and every unweighted term without graph.

        Args:
            batch: see :class:`distill.training.module.DistillationModule`; nothing of tokens that its mask leaves out
                reaches loss or gradient.
            losses: (kind, loss) with numbers for weights.
        """
        mask, positions = batch["mask"], batch.get("position_ids")
        documents = None if positions is None else (positions == 0).cumsum(1)
        hide = ~mask.unsqueeze(-1)
        ours, theirs = (
            {state: seen.to(mask.device).masked_fill(hide, 0) for state, seen in states.take().items()}
            for states in (self.student, self.teacher)
        )
        terms = {}
        for name, loss in losses:
            met = self._met(loss, ours, theirs)
            sums = [settled(student, teacher, mask, documents).sum for settled, student, teacher in met]
            terms[name] = LossTerm(torch.stack(sums).mean(), mask.sum())
        total = torch.stack([number(loss.weight) * terms[name].sum for name, loss in losses]).sum()
        return total, {name: term.detach() for name, term in terms.items()}

    def _met(
        self, loss: StateLossSpec, ours: dict[State, Tensor], theirs: dict[State, Tensor]
    ) -> Iterator[tuple[StateLossSpec, Tensor, Tensor]]:
        """What a loss compares: the student's states beside the teacher's, of one width where that is needed."""
        for part in loss.parts:
            settled = loss.between(self.student.shapes.parts[part], self.teacher.shapes.parts[part])
            for i, j in self.pairs[loss.kind]:
                student, teacher = ours[part, i], theirs[part, j]
                if loss.kind in self.projections:
                    linear = self.projections[loss.kind]
                    student = linear(student.to(linear.weight.dtype))  # type: ignore[arg-type]
                elif part == "block" and self.channels is not None:
                    teacher = teacher.index_select(-1, self.channels)
                yield settled, student, teacher

    def summary(self) -> list[str]:
        """A line a loss for people: which layers meet, and how widths are brought together."""
        lines = []
        for kind, pairs in self.pairs.items():
            line = f"{kind}: layers of the student <- teacher: " + ", ".join(f"{i} <- {j}" for i, j in pairs)
            if kind in self.projections:
                line += "; {} -> {} channels by a linear map that is learned and not kept".format(*self.widths)
            lines.append(line)
        if self.channels is not None:
            lines.append("hidden states meet in the {} of {} channels that were kept".format(*self.widths))
        return lines
