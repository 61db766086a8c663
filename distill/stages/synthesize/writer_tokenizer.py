"""The tokenizer of a model that writes, with the chat template that it is asked by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.data.chat_spec import ChatSpec
from distill.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distill.stages.session import Session


def writer_tokenizer(session: Session, reference: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a writer, with its own template; a file in ``data.chat.template`` replaces the teacher's.

    Args:
        session: of the stage.
        reference: of the model.

    Raises:
        InputError: it cannot be loaded, or has no chat template.
    """
    location = session.artifact(reference).location
    tokenizer = load_tokenizer(location)
    is_teacher = session.teacher is not None and location == session.artifact("teacher").location
    if is_teacher and (written := (session.data.chat or ChatSpec()).written()) is not None:
        tokenizer.chat_template = written
    if not tokenizer.chat_template:
        raise InputError(
            f"writer: {location} has no chat template, so it does not follow instructions; name a model that was tuned "
            "to (such as ...-Instruct), or a server"
        )
    return tokenizer
