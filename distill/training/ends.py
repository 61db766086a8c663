"""Student and teacher must end a text alike before the student may learn from sequences of its own.

A base student beside a chat-tuned teacher of one family shares every token id and still ends a text by another one:
the teacher never rewards the end that the student knows, so own sequences grow to the limit and fall apart.
"""

from __future__ import annotations

from distill.core.errors import InputError

Ends = int | list[int] | None
"""``eos_token_id`` as a config has it."""


def agreed_ends(student: Ends, teacher: Ends, end: int | None = None) -> tuple[int, ...]:
    """The ids that end a text for both models.

    Args:
        student: ``eos_token_id`` of its generation config.
        teacher: likewise.
        end: id that ends a document in the run's text, when it is known.

    Raises:
        InputError: they differ, or lack the id that ends a document.
    """
    ours, theirs = _ids(student), _ids(teacher)
    if ours != theirs:
        raise InputError(
            f"on_policy: the student ends a text with token {_said(ours)}, the teacher with {_said(theirs)}, so own "
            "sequences would not learn to end; give both the same eos_token_id in generation_config.json"
        )
    if end is not None and end not in ours:
        raise InputError(
            f"on_policy: both models end a text with token {_said(ours)}, the run's tokenizer with {end}; give the "
            "models that eos_token_id in generation_config.json, or set data.tokenizer to a model's own"
        )
    return tuple(sorted(ours))


def _ids(ends: Ends) -> set[int]:
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def _said(ends: set[int]) -> str:
    return " or ".join(map(str, sorted(ends))) or "(none)"
