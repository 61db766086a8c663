"""Prompt distillation: the teacher reads a document and the question, the student only the question.

    loss = sum over t of D( student(. | question, answer_<t),  teacher(. | document, question, answer_<t) )

So the student learns to answer without the document as the teacher answers with it. Only the tokens before an answer
differ; those of the answer are the same, so position p of a student's row is position p + s of the teacher's, where s
is the number of tokens that the document adds. The losses see the teacher's hidden states at the student's positions.

The teacher reads each conversation separately, without padding. So its output depends only on the conversation, not
on the batch or the order. It is cached in memory, and computed once for several passes over the rows. On-policy samples
never repeat, so their output is not cached.

Source: Kujanpaa et al. 2024, arXiv 2412.14964; Snell et al. 2022, arXiv 2209.15189 (context distillation).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distill.core.batch import SAMPLED
from distill.core.errors import InputError
from distill.data.document_prompts import DocumentPrompts
from distill.losses.head_losses import Head, Signal
from distill.training.teacher import Teacher

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from distill.losses.base import LossSpec

KEPT_BYTES = 2 << 30
"""Bytes for cached hidden states of answers; states that do not fit are recomputed."""


class DocumentTeacher(Teacher):
    """Wraps a teacher so that it also reads the documents.

    Args:
        inner: a teacher with a model in memory.
        prompts: prompts with their documents.

    Raises:
        InputError: a row is longer than the teacher's context, or no row has a document.
    """

    def __init__(self, inner: Teacher, prompts: DocumentPrompts):
        if inner.model is None:
            raise InputError("teacher_reads: document needs a teacher in memory, not a cache; name its teacher")
        positions = getattr(inner.model.config.get_text_config(), "max_position_embeddings", None)
        prompts.check(positions if isinstance(positions, int) else None)
        self.inner, self.prompts, self.model = inner, prompts, inner.model
        self._kept: dict[bytes, Tensor] = {}  # what the teacher reads, and where -> its hidden states, on the CPU
        self._room = KEPT_BYTES
        self._head: Head | None = None

    def check(self, losses: Iterable[LossSpec]) -> None:
        """See :meth:`Teacher.check`."""
        self.inner.check(losses)

    def move(self, device: torch.device) -> None:
        """See :meth:`Teacher.move`."""
        self.inner.move(device)
        self._head = None

    def shard(self, mesh: DeviceMesh) -> None:
        """Raise an error: ranks would read different numbers of conversations, and wait for each other."""
        raise InputError("teacher_reads: document cannot be used with compute.strategy: fsdp; use ddp")

    def signal(self, batch: dict[str, Tensor]) -> Signal:
        """The teacher's hidden states at the student's counted positions, zeros elsewhere, and its head."""
        ids, mask = batch["input_ids"].cpu().numpy(), batch["mask"].cpu().numpy()  # [batch, sequence]
        places = batch["position_ids"].cpu().numpy() if "position_ids" in batch else None
        device = batch["input_ids"].device
        rows, columns, states = list[np.ndarray](), list[np.ndarray](), list[Tensor]()
        for row in range(len(ids)):
            for start, end in _pieces(None if places is None else places[row], ids.shape[1]):
                counted = np.flatnonzero(mask[row, start:end])  # positions in the piece, [counted]
                if len(counted):
                    states.append(self._read(ids[row, start:end], counted, device, keeps=SAMPLED not in batch))
                    rows.append(np.full(len(counted), row))
                    columns.append(counted + start)
        # no counted positions, or all states cached: run one token only to get the head
        if not states or self._head is None:
            some = self.inner.signal({"input_ids": batch["input_ids"][:1, :1]})
            assert isinstance(some, Signal)
            states.append(some.hidden[:, :0].flatten(0, 1).to(device))
            self._head = some.head
        hidden = torch.cat(states)  # [counted, hidden]
        aligned = torch.zeros(*ids.shape, hidden.shape[-1], dtype=hidden.dtype, device=device)
        if rows:
            at = (torch.from_numpy(np.concatenate(some)).to(device) for some in (rows, columns))
            aligned[tuple(at)] = hidden
        return Signal(aligned, self._head)

    def _read(self, piece: np.ndarray, counted: np.ndarray, device: torch.device, *, keeps: bool) -> Tensor:
        """Hidden states of the teacher at the counted positions of a piece, [counted, hidden].

        Args:
            piece: ids of a conversation as the student reads it, int64 [tokens].
            counted: positions whose next token counts, ascending, int64 [counted].
            device: device of the student.
            keeps: whether to cache them for a later pass over the text.
        """
        first, last = int(counted[0]), int(counted[-1])
        shown = self.prompts.find(piece[: first + 1])
        prompt = piece[: first + 1] if shown is None else shown
        row = np.concatenate([prompt, piece[first + 1 : last + 1]])  # [tokens that the teacher reads]
        positions = counted + (len(prompt) - first - 1)
        key = row.tobytes() + positions.tobytes()
        if key in self._kept:
            return self._kept[key].to(device)
        signal = self.inner.signal({"input_ids": torch.from_numpy(row).unsqueeze(0).to(device)})
        assert isinstance(signal, Signal)
        self._head = signal.head
        hidden = signal.hidden[0, torch.from_numpy(positions).to(signal.hidden.device)]  # [counted, hidden]
        if keeps and self._room >= (size := hidden.numel() * hidden.element_size()):
            self._room -= size
            self._kept[key] = hidden.cpu().clone()
        return hidden.to(device)


def _pieces(places: np.ndarray | None, length: int) -> list[tuple[int, int]]:
    """Start and end of each conversation of a row, from its position ids; padding is a piece without counted tokens."""
    if places is None:
        return [(0, length)]
    starts = [int(start) for start in np.flatnonzero(places == 0)] or [0]
    return list(zip(starts, [*starts[1:], length], strict=True))
