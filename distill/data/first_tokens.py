"""The tokens that a tokenizer puts around every text. A model that was trained with start tokens such as ``<bos>`` has
never seen a row without them.

The tokenizers of Gemma, Llama 2 and Llama 3 put ``<bos>`` before each text, and their models give it most of their
attention. A row from the middle of a document lacks it, and the model's loss there is much too high. So each piece of
text that a model reads separately begins with the tokens that its tokenizer puts there; they count in
``sequence_length``. They follow from the tokenizer, so predicting them is useless, and they are never predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE = "a"


def around(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and after a text.

    Args:
        tokenizer: a tokenizer as it is used in inference, with its special tokens.
    """
    encode = tokenizer.backend_tokenizer.encode
    whole, inner = encode(_PROBE).ids, encode(_PROBE, add_special_tokens=False).ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    return whole[:at], whole[at + len(inner) :]


def room_of(sequence_length: int, start: Sequence[int]) -> int:
    """Number of tokens of text in a row that begins in the middle of a document.

    Raises:
        InputError: fewer than 2, so no token could be predicted from another.
    """
    room = sequence_length - len(start)
    if room < 2:
        raise InputError(
            f"data.sequence_length ({sequence_length}) must be at least {len(start) + 2}, as each row begins with "
            f"{len(start)} token{'s' * (len(start) > 1)} that the tokenizer puts before a text"
        )
    return room


def written_start(backend: dict[str, Any]) -> list[str] | None:
    """The tokens that a ``tokenizer.json`` puts before a text; None if they cannot be determined.

    Args:
        backend: the file's content.
    """
    try:
        return _written_start(backend.get("post_processor") or {})
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):  # damaged; loading it raises an error
        return None


def _written_start(processor: dict[str, Any]) -> list[str] | None:
    for one in processor.get("processors", [processor]):
        if one.get("type") == "TemplateProcessing":
            names = [next(iter(part.items())) for part in one["single"]]
            before = [value["id"] for kind, value in names[: [kind for kind, _ in names].index("Sequence")]]
            special = one["special_tokens"]
            return [token for name in before for token in special[name]["tokens"]]
        if one.get("type") in ("RobertaProcessing", "BertProcessing"):
            return [one["cls"][0]]
        if one.get("type") not in (None, "ByteLevel"):
            return None
    return []


def described(start: Sequence[str]) -> str:
    """Describe to the user what rows begin with."""
    if not start:
        return "rows begin with no further token, as the tokenizer puts none before a text"
    return (
        f"each row begins with {' '.join(map(repr, start))}, which the tokenizer puts before a text; it counts in "
        "sequence_length and is never predicted"
    )
