"""Losses on hidden states during training: the pairs of layers, the projections between widths, and the sum.

A linear map that is learned for a loss is trained, saved and resumed with the student, but is not part of the student.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill.losses import LossTerm, StateLossSpec
from distill.losses.layer_losses import HiddenLossSpec
from distill.losses.schedule import number
from distill.models.states import State, States, pairs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.pruning.origin import Origin


class StateLosses(nn.Module):
    """The losses of a run that read hidden states. The models are not registered as submodules.

    Args:
        losses: losses on hidden states.
        student: model that is trained.
        teacher: model whose states are the targets.
        origin: layers and channels of the teacher from which the student was pruned; None if it was not.

    Attributes:
        student: recorder of the student's states, which must be active during the forward pass.
        teacher: recorder of the teacher's states; the teacher may be the same model.
        widths: number of channels of the student's and the teacher's hidden states.
        pairs: kind of the loss -> (student layer, teacher layer) pairs.
        projections: kind of the loss -> linear map from the student's to the teacher's channels, if one is learned.

    Raises:
        InputError: a loss cannot be computed between these two models.
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
            raise ValueError(
                f"{origin} does not belong to this student, which has {size[0]} layers x {size[1]} channels"
            )
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
        """A linear map from the student's to the teacher's channels, with a weight [teacher width, student width].

        It is initialised to select the channels that were kept, if they are known; otherwise to a random rotation.
        """
        linear = nn.utils.skip_init(nn.Linear, *self.widths, bias=False)
        if self.channels is not None:
            nn.init.zeros_(linear.weight).data[self.channels, torch.arange(len(self.channels))] = 1.0
        elif self.widths[0] == self.widths[1]:
            nn.init.eye_(linear.weight)
        else:  # with its own generator, so that other random numbers do not depend on the losses
            nn.init.orthogonal_(linear.weight, generator=torch.Generator().manual_seed(0))
        return linear

    def forward(
        self, batch: dict[str, Tensor], losses: Sequence[tuple[str, StateLossSpec]]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """The weighted sum of the losses over the recorded batch (scalar), and the unweighted terms without a graph.

        Args:
            batch: see :class:`distill.training.module.DistillationModule`. In a causal model, tokens where its mask is
                False affect neither losses nor gradients. In an encoder the states of all tokens are compared, except
                padding (see :func:`_weights`).
            losses: (kind, loss) pairs. Their weights must be numbers, not schedules.
        """
        counted, positions = batch["mask"], batch.get("position_ids")
        documents = None if positions is None else (positions == 0).cumsum(1)  # index of each token's document
        is_causal = self.student.shapes.is_causal
        mask = counted if is_causal else _weights(counted, batch.get("attention_mask"))  # [batch, sequence]
        hide = ~mask.bool().unsqueeze(-1)  # [batch, sequence, 1]
        ours, theirs = (  # (part, layer) -> [batch, sequence, width]
            {state: seen.to(mask.device).masked_fill(hide, 0) for state, seen in states.take().items()}
            for states in (self.student, self.teacher)
        )
        terms = {}
        for name, loss in losses:
            met = self._met(loss, ours, theirs)
            sums = [
                settled(student, teacher, mask, documents, is_causal=is_causal).sum for settled, student, teacher in met
            ]
            terms[name] = LossTerm(torch.stack(sums).mean(), counted.sum())
        total = torch.stack([number(loss.weight) * terms[name].sum for name, loss in losses]).sum()
        return total, {name: term.detach() for name, term in terms.items()}

    def _met(
        self, loss: StateLossSpec, ours: dict[State, Tensor], theirs: dict[State, Tensor]
    ) -> Iterator[tuple[StateLossSpec, Tensor, Tensor]]:
        """The pairs of states that a loss compares, projected to the same width if necessary."""
        if loss.is_joint:
            settled = loss.between(*(states.shapes.parts[loss.parts[0]] for states in (self.student, self.teacher)))
            for i, j in self.pairs[loss.kind]:
                both = [[seen[part, at] for part in loss.parts] for seen, at in ((ours, i), (theirs, j))]
                yield settled, torch.cat(both[0], -1), torch.cat(both[1], -1)
            return
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
        """One line per loss for the log: which layers are compared, and how different widths are projected."""
        lines = []
        for kind, pairs in self.pairs.items():
            line = f"{kind}: layers of the student <- teacher: " + ", ".join(f"{i} <- {j}" for i, j in pairs)
            if kind in self.projections:
                line += "; {} -> {} channels through a linear map that is trained and then removed".format(*self.widths)
            lines.append(line)
        if self.channels is not None:
            lines.append("hidden states are compared in the {} of {} channels that were kept".format(*self.widths))
        return lines


def _weights(counted: Tensor, attended: Tensor | None) -> Tensor:
    """The weight of each token in the losses on the states of an encoder, [batch, sequence].

    The states of all tokens of a row are compared, also where the task has one prediction per text or predicts some
    tokens only. The weights of a row's tokens add up to the number of its predictions. All losses of a batch are then
    divided by the same number, and the result does not depend on the micro-batches:

        w_i = (predictions of the row that count) / (tokens of the row)        0 for padding

    Args:
        counted: predictions that count, bool [batch, sequence] or [batch, 1].
        attended: 1 for tokens and 0 for padding, [batch, sequence]; None: rows are not padded; the mask is returned.
    """
    if attended is None:
        return counted
    tokens = attended.sum(1, keepdim=True).clamp(min=1)  # [batch, 1]
    return attended * (counted.sum(1, keepdim=True) / tokens)
