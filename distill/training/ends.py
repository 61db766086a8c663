"""End-of-text tokens: student and teacher must agree on them before the student may learn from its own samples.

A base student and a chat-tuned teacher of the same family have the same vocabulary, and may still use different
end-of-text tokens. Then the teacher gives no probability to the student's end-of-text token, so the samples grow to the
length limit and degenerate.
"""

from __future__ import annotations

from collections.abc import Mapping

from distill.core.errors import InputError

Ends = int | list[int] | None
"""``eos_token_id`` as in a config."""


def agreed_ends(student: Ends, teacher: Ends, end: int | None = None) -> tuple[int, ...]:
    """The ids of the end-of-text tokens, which must be the same for both models.

    Args:
        student: ``eos_token_id`` of the student's generation config.
        teacher: ``eos_token_id`` of the teacher's generation config.
        end: id of the token that ends a document in the training text; None if unknown.

    Raises:
        InputError: the two models differ, or ``end`` is not among their ids.
    """
    ours, theirs = ends_of(student), ends_of(teacher)
    if ours != theirs:
        raise InputError(
            f"on_policy: the student ends a text with token {said(ours)}, the teacher with {said(theirs)}, so "
            "samples would not learn to end; give both the same eos_token_id in generation_config.json"
        )
    if end is not None and end not in ours:
        raise InputError(
            f"on_policy: both models end a text with token {said(ours)}, the run's tokenizer with {end}; give the "
            "models that eos_token_id in generation_config.json, or set data.tokenizer to a model's own"
        )
    return tuple(sorted(ours))


def note_of_ends(student: Ends, teacher: Ends, names: Mapping[int, str] | None = None) -> str | None:
    """A note for the user if the models have no end-of-text token in common; None if they have one, or if unknown.

    Args:
        student: ``eos_token_id`` of the student's generation config.
        teacher: ``eos_token_id`` of the teacher's generation config.
        names: id -> token, for the tokens that are known.
    """
    ours, theirs = ends_of(student), ends_of(teacher)
    if not ours or not theirs or ours & theirs:
        return None
    return (
        f"note: the student ends a text with token {said(ours, names)}, the teacher with {said(theirs, names)}; the "
        "student learns the end that the run's text has, which is that of data.tokenizer"
    )


def ends_of(ends: Ends) -> set[int]:
    """The ids as a set; empty if the config has none."""
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def said(ends: set[int], names: Mapping[int, str] | None = None) -> str:
    """Token ids for a message, with the token if ``names`` has it."""
    named = {id_: f" {names[id_]!r}" for id_ in ends if names is not None and id_ in names}
    return " or ".join(f"{id_}{named.get(id_, '')}" for id_ in sorted(ends)) or "(none)"
