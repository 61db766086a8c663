"""What cutting the vocabulary means for token ids: those that stay are renumbered, special ones in the config too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.core.errors import InputError
from distill.pruning.layout import Config, Layout

TOKEN_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "cls_token_id", "sep_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)
"""Keys of a config or generation config that name tokens which the model is to say or to read."""
BANNED_KEYS = ("suppress_tokens", "begin_suppress_tokens")
"""Keys with tokens that it is not to say."""
PHRASE_KEYS = ("bad_words_ids", "sequence_bias")
"""Keys with phrases that it is not to say ([[id, ...], ...]), or more or less often ([[[id, ...], bias], ...])."""


def kept_tokens(vocabulary: Sequence[int], before: Mapping[str, int]) -> tuple[int, ...]:
    """The ids to keep, each known to the model and named once.

    Raises:
        InputError: they are not, or there are none.
    """
    size = before["vocabulary"]
    if wrong := [token for token in vocabulary if not 0 <= token < size]:
        raise InputError(f"the vocabulary to keep names token {wrong[0]}, expected ids from 0 to {size - 1}")
    if not vocabulary or len({*vocabulary}) < len(vocabulary):
        raise InputError(f"the vocabulary to keep names {len(vocabulary)} tokens, expected one or more, each once")
    return tuple(vocabulary)


def moved_tokens(layout: Layout, config: Config, tokens: tuple[int, ...]) -> dict[str, Any]:
    """The new ids of the special tokens that a config names, where they change.

    Raises:
        InputError: one of them does not stay, or may not move.
    """
    moved = renumbered(config, tokens)
    for key in layout.pinned_tokens:
        if key in moved:
            raise InputError(
                f"the config's {key} ({config[key]}) would become {moved[key]}, but {layout.model_type} counts "
                "positions from it; keep that token at its place"
            )
    return moved


def renumbered(config: Config, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Token ids of a config or generation config -> the ids after the cut, for the keys whose value changes.

    Raises:
        InputError: a token that is named does not stay.
    """
    place = {token: index for index, token in enumerate(tokens)}
    moved: dict[str, Any] = {}
    for key in TOKEN_KEYS:
        value = config.get(key)
        old = [token for token in (value if isinstance(value, list) else [value]) if token is not None]
        if lost := [token for token in old if token not in place]:
            raise InputError(
                f"the config's {key} names token {lost[0]}, which the vocabulary to keep leaves out; keep it"
            )
        new = [place[token] for token in old]
        if new != old:
            moved[key] = new if isinstance(value, list) else new[0]
    # what the model can no longer say needs no ban
    for key in BANNED_KEYS:
        if banned := config.get(key):
            moved[key] = [place[token] for token in banned if token in place] or None
    for key in PHRASE_KEYS:
        if phrases := config.get(key):
            those = [_moved(phrase, place) for phrase in _listed(phrases)]
            moved[key] = [phrase for phrase in those if phrase is not None] or None
    return {key: value for key, value in moved.items() if value != config.get(key)}


def _listed(phrases: Any) -> list[Any]:
    """A mapping of phrases to biases as a file has it."""
    return [[list(ids), bias] for ids, bias in phrases.items()] if isinstance(phrases, Mapping) else list(phrases)


def _moved(phrase: Any, place: Mapping[int, int]) -> list[Any] | None:
    """A phrase, or one with its bias, in the new ids; None where one of them is gone."""
    if isinstance(phrase[0], Sequence):
        ids = _moved(phrase[0], place)
        return None if ids is None else [ids, phrase[1]]
    return [place[token] for token in phrase] if all(token in place for token in phrase) else None
