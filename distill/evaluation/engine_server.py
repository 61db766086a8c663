"""What runs inside the process of an :class:`~distill.evaluation.engine_process.EngineProcess`."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy

from distill.evaluation.engine import Engine, Opening
from distill.evaluation.model_process import say


@dataclass(frozen=True)
class EngineFacts:
    """Of an engine that runs; see :class:`~distill.evaluation.engine.Engine`."""

    name: str
    device: str
    dtype: str
    vocabulary: int


def serve(connection: Connection, opening: Opening) -> None:
    """Answer what is asked, until nobody asks any more."""
    engine = opening.open()
    facts = EngineFacts(engine.name, engine.device, engine.dtype, engine.vocabulary)
    say(connection, vars(facts))
    text: list[int] = []
    while True:
        kind, ids, number = connection.recv()
        if kind == "logits":
            for piece in engine.logits(ids, number):
                say(connection, piece)
            continue
        if kind == "rows":
            say(connection, engine.row(ids, number))
            continue
        if ids is not None:
            engine.reserve(1, len(ids) + number)
        text = ids if ids is not None else [*text, number]
        say(connection, _next(engine, text, is_new=ids is not None))


def _next(engine: Engine, text: list[int], *, is_new: bool) -> int:
    """The likeliest token after a text, of which all but the last has been read where it is not new."""
    if is_new or not engine.decodes:
        logits = engine.prefill(numpy.array([text], numpy.int64))
    else:
        logits = engine.step(numpy.array(text[-1:], numpy.int64))
    return int(logits[0].argmax())
