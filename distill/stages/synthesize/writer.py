"""Opens the writer that a recipe names."""

from __future__ import annotations

from distill.stages.session import StageContext
from distill.stages.synthesize.local_writer import LocalWriter
from distill.stages.synthesize.requests import Writer
from distill.stages.synthesize.server_writer import ServerWriter
from distill.stages.synthesize.writer_spec import ServerSpec


def writer_of(choice: str | ServerSpec, batch_size: int, context: StageContext) -> Writer:
    """The model, loaded, or the server, probed.

    Args:
        choice: reference of a model, or a server.
        batch_size: requests that a model answers at once.
        context: of the stage.

    Raises:
        InputError: the model or the server cannot write.
        MachineError: the server does not answer.
    """
    if isinstance(choice, str):
        return LocalWriter(context, choice, batch_size)
    return ServerWriter(choice, context.session.seed, context.say)
