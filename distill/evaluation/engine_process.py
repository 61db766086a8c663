"""A model in its engine, in a separate process that returns logits or the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.evaluation.engine import Opening
from distill.evaluation.engine_server import EngineFacts, serve
from distill.evaluation.model_process import Child
from distill.evaluation.quality import Chunk

ANSWER_S = 600.0
"""Seconds without an answer from the engine after which an error is raised."""


class EngineProcess:
    """Opens a model in its engine; a context manager.

    Args:
        opening: of the model.
        what: name of the model in error messages.

    Attributes:
        facts: of the engine.

    Raises:
        MachineError: the engine or the model cannot be loaded; one line.
    """

    def __init__(self, opening: Opening, what: str):
        self._child = Child(serve, opening, what=what, module=opening.module)
        try:
            self.facts = EngineFacts(**self._child.receive(ANSWER_S))
        except BaseException:
            self._child.__exit__()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()

    def logits(self, ids: Sequence[int], first: int) -> Iterator[Tensor]:
        """After each token of a text from the position ``first`` on, in pieces, fp32 [tokens, vocabulary]."""
        self._child.send(("logits", [*ids], first))
        left = len(ids) - first
        while left > 0:  # nothing may be left in the pipe when the last piece has been taken
            piece = self._child.receive(ANSWER_S)
            left -= len(piece)
            yield torch.from_numpy(piece)

    def write(self, ids: Sequence[int], new_tokens: int, is_over: Callable[[list[int]], bool]) -> list[int]:
        """What the model writes greedily after a prompt.

        Args:
            ids: of the prompt.
            new_tokens: at most.
            is_over: whether what is written so far is the whole answer.
        """
        written: list[int] = []
        self._child.send(("write", [*ids], new_tokens))
        while len(written) < new_tokens:
            written.append(int(self._child.receive(ANSWER_S)))
            if len(written) == new_tokens or is_over(written):
                break
            self._child.send(("write", None, written[-1]))
        return written

    def predictions(self, batch: dict[str, Tensor]) -> Chunk:
        """The counted predictions of a batch, which must be asked for in order.

        An engine reads one text at a time: documents that share a row are read each by itself, as a model that keeps
        them apart reads them (see :mod:`distill.core.batch`).
        """
        pieces, left = self._counted(batch), torch.empty(0, self.facts.vocabulary)

        def chunk(piece: slice) -> Tensor:
            nonlocal left
            parts, held = [left] if len(left) else [], len(left)  # of a classifier, logits are not of a vocabulary
            while held < piece.stop - piece.start:
                parts.append(next(pieces))
                held += len(parts[-1])
            whole = torch.cat(parts)
            left = whole[piece.stop - piece.start :].clone()
            return whole[: piece.stop - piece.start]

        return chunk

    def _counted(self, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        if "attention_mask" in batch:  # rows of another task than the next token
            yield from self._of_padded(batch)
            return
        places = batch.get("position_ids")
        for row, (ids, mask) in enumerate(zip(batch["input_ids"].tolist(), batch["mask"], strict=True)):
            begins = [0] if places is None else (places[row] == 0).nonzero().flatten().tolist()
            for begin, end in pairwise([*begins, len(ids)]):
                counted = mask[begin:end].nonzero().flatten()
                if len(counted):
                    yield from self._of_text(ids[begin : begin + int(counted[-1]) + 1], counted)

    def _of_padded(self, batch: dict[str, Tensor]) -> Iterator[Tensor]:
        """The counted predictions of each row, which an engine reads without its padding."""
        kinds = batch.get("token_type_ids")
        for row, (ids, attended, mask) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], batch["mask"], strict=True)
        ):
            text = ids[attended.bool()].tolist()
            second = None if kinds is None else len(text) - int(kinds[row].sum())
            self._child.send(("rows", text, second))
            found = torch.from_numpy(self._child.receive(ANSWER_S))  # [tokens, vocabulary], or [1, classes]
            yield found[mask[: len(found)]]

    def _of_text(self, ids: list[int], counted: Tensor) -> Iterator[Tensor]:
        at = int(counted[0])
        for piece in self.logits(ids, at):
            inside = counted[(counted >= at) & (counted < at + len(piece))]
            yield piece[inside - at]
            at += len(piece)
