"""Token ids after a cut of the vocabulary: kept tokens are renumbered, including the special tokens in the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.core.errors import InputError
from distill.pruning.layout import Config, Layout

TOKEN_KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "cls_token_id", "sep_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)
"""Keys of a config or generation config that hold the id of a special token, or a list of ids."""
BANNED_KEYS = ("suppress_tokens", "begin_suppress_tokens")
"""Keys with lists of tokens that must not be generated."""
PHRASE_KEYS = ("bad_words_ids", "sequence_bias")
"""Keys with token sequences that are banned ([[id, ...], ...]) or get a bias ([[[id, ...], bias], ...])."""


def kept_tokens(vocabulary: Sequence[int], before: Mapping[str, int]) -> tuple[int, ...]:
    """The ids to keep, checked.

    Raises:
        InputError: an id is out of range or repeated, or there are none.
    """
    size = before["vocabulary"]
    if wrong := [token for token in vocabulary if not 0 <= token < size]:
        raise InputError(f"the vocabulary to keep has token {wrong[0]}, expected ids from 0 to {size - 1}")
    if not vocabulary or len({*vocabulary}) < len(vocabulary):
        raise InputError(
            f"the vocabulary to keep has {len(vocabulary)} ids, {len({*vocabulary})} of them distinct; expected one or "
            "more ids without repetition"
        )
    return tuple(vocabulary)


def moved_tokens(layout: Layout, config: Config, tokens: tuple[int, ...]) -> dict[str, Any]:
    """The config keys whose special tokens get a new id, with the new values.

    Raises:
        InputError: a special token is not kept, or the architecture does not allow its id to change.
    """
    moved = renumbered(config, tokens)
    for key in layout.pinned_tokens:
        if key in moved:
            raise InputError(
                f"the config's {key} ({config[key]}) would become {moved[key]}, but {layout.model_type} computes "
                "positions from this id; keep the tokens before it too, so that its id does not change"
            )
    return moved


def renumbered(config: Config, tokens: tuple[int, ...]) -> dict[str, Any]:
    """The keys of a config or generation config with token ids whose value changes, with the ids after the cut.

    Raises:
        InputError: a special token is not kept.
    """
    new_id = {token: index for index, token in enumerate(tokens)}
    moved: dict[str, Any] = {}
    for key in TOKEN_KEYS:
        value = config.get(key)
        old = [token for token in (value if isinstance(value, list) else [value]) if token is not None]
        if lost := [token for token in old if token not in new_id]:
            raise InputError(
                f"the config's {key} is token {lost[0]}, which is not in the vocabulary to keep; add it there"
            )
        new = [new_id[token] for token in old]
        if new != old:
            moved[key] = new if isinstance(value, list) else new[0]
    # a removed token cannot be generated, so it is dropped from these lists
    for key in BANNED_KEYS:
        if banned := config.get(key):
            moved[key] = [new_id[token] for token in banned if token in new_id] or None
    for key in PHRASE_KEYS:
        if phrases := config.get(key):
            those = [_renumbered_phrase(phrase, new_id) for phrase in _phrase_list(phrases)]
            moved[key] = [phrase for phrase in those if phrase is not None] or None
    return {key: value for key, value in moved.items() if value != config.get(key)}


def _phrase_list(phrases: Any) -> list[Any]:
    """The phrases as a list, also if they are given as a mapping from phrase to bias."""
    return [[list(ids), bias] for ids, bias in phrases.items()] if isinstance(phrases, Mapping) else list(phrases)


def _renumbered_phrase(phrase: Any, new_id: Mapping[int, int]) -> list[Any] | None:
    """A phrase, or a phrase with its bias, in the new ids; None if one of its tokens was removed."""
    if isinstance(phrase[0], Sequence):
        ids = _renumbered_phrase(phrase[0], new_id)
        return None if ids is None else [ids, phrase[1]]
    return [new_id[token] for token in phrase] if all(token in new_id for token in phrase) else None
