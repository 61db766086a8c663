"""Reduces the vocabulary of a tokenizer: chooses the tokens that stay, and makes the tokenizer without the others.

    needed(t) = t and all intermediate tokens of its merges        counts(t) = how often t occurs in the text

Special and added tokens stay, and tokens of one byte or one character, so that every text can still be encoded. If all
tokens of a text stay, its tokens do not change: the removed merges never applied in it (byte-pair encoding), the
longest piece is still the longest (WordPiece), and the most likely path is still the most likely (unigram). Any other
text takes more and shorter tokens.

Prefer it if the vocabulary is a large part of a small model, or was made for many languages of which one is needed; not
if future text differs in kind from the text that was counted.

Source: Abdaoui et al. 2020, arXiv 2010.05609 (reducing a vocabulary to the tokens of a corpus).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.artifact import replacing
from distill.core.errors import InputError
from distill.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def tokens_to_keep(
    tokenizer: PreTrainedTokenizerFast, counts: np.ndarray, num_tokens: int | None = None, named: Iterable[int] = ()
) -> list[int]:
    """Choose the tokens that stay.

    Args:
        tokenizer: the tokenizer to reduce.
        counts: number of occurrences of each id in the text. int64 [ids]
        num_tokens: number of tokens that stay, the most frequent first, then the lowest ids; None keeps all tokens that
            occur in the text.
        named: ids that always stay, such as those that a config names.

    Returns:
        Old ids, ascending; the index of a token is its new id.

    Raises:
        InputError: the tokenizer cannot be reduced, or ``num_tokens`` is smaller than the number of required tokens or
            larger than the vocabulary.
    """
    backend = _backend(tokenizer)
    vocabulary = tokenizer.get_vocab()
    needed = _needed(backend["model"], vocabulary)
    must = {entry["id"] for entry in backend["added_tokens"]} | {id_ for id_ in named if id_ < len(vocabulary)}
    must |= {id_ for token, id_ in vocabulary.items() if _must_stay(token, backend["model"])}
    kept = {part for id_ in must for part in needed(id_)}
    if num_tokens is None:
        used = (id_ for id_ in vocabulary.values() if id_ < len(counts) and counts[id_])
        return sorted(kept | {part for id_ in used for part in needed(id_)})
    if not len(kept) <= num_tokens <= len(vocabulary):
        raise InputError(
            f"keep.vocabulary ({num_tokens}) must be from {len(kept)} (special tokens, and those of one byte or "
            f"character) to the tokenizer's {len(vocabulary)}"
        )
    for id_ in sorted(vocabulary.values(), key=lambda id_: (-int(counts[id_]) if id_ < len(counts) else 0, id_)):
        if len(kept) == num_tokens:
            break
        if len(more := kept | needed(id_)) <= num_tokens:
            kept = more
    return sorted(kept)


def cut_tokenizer(tokenizer: PreTrainedTokenizerFast, kept: Sequence[int], folder: Path) -> PreTrainedTokenizerFast:
    """Make the tokenizer with only these tokens, save it and load it again.

    Args:
        tokenizer: the full tokenizer; unchanged.
        kept: ids of the tokens that stay, from :func:`tokens_to_keep`.
        folder: where it is saved; an existing folder is replaced.

    Raises:
        InputError: the saved tokenizer does not reload unchanged, because some classes hard-code tokens.
    """
    place = {old: new for new, old in enumerate(kept)}
    backend = _backend(tokenizer)
    stays = {token for token, id_ in tokenizer.get_vocab().items() if id_ in place}
    _cut_model(backend["model"], stays, place)
    backend["added_tokens"] = [{**entry, "id": place[entry["id"]]} for entry in backend["added_tokens"]]
    backend["post_processor"] = _renumbered(backend["post_processor"], place)
    with replacing(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        (temporary / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
        config = json.loads((temporary / "tokenizer_config.json").read_text(encoding="utf-8"))
        if "added_tokens_decoder" in config:
            added = config["added_tokens_decoder"]
            config["added_tokens_decoder"] = {str(place[int(old)]): entry for old, entry in added.items()}
            (temporary / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    loaded = load_tokenizer(folder)
    if rows_of(loaded, tokenizer) != list(kept):
        raise InputError(
            f"keep.vocabulary: a {type(tokenizer).__name__} makes its tokens anew when it is loaded, so they cannot be "
            "cut; leave the vocabulary whole"
        )
    return loaded


def rows_of(part: PreTrainedTokenizerFast, whole: PreTrainedTokenizerFast) -> list[int] | None:
    """The ids in ``whole`` of the tokens of ``part``, in the order of their ids in ``part``; None if a token is not in
    ``whole``."""
    theirs = whole.get_vocab()
    ours = sorted(part.get_vocab().items(), key=lambda item: item[1])
    if [id_ for _, id_ in ours] != list(range(len(ours))) or any(token not in theirs for token, _ in ours):
        return None
    return [theirs[token] for token, _ in ours]


def _backend(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = found["model"]
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if model["type"] not in ("BPE", "WordPiece", "Unigram") or (model["type"] == "BPE" and odd):
        what = model["type"] + (f" with {odd[0]}" if odd else "")
        raise InputError(f"keep.vocabulary: a {what} tokenizer cannot be cut (BPE, WordPiece and Unigram can)")
    return found


def _must_stay(token: str, model: dict[str, Any]) -> bool:
    """Whether some text could not be encoded without the token."""
    if model.get("byte_fallback"):
        return bool(_BYTE.fullmatch(token))  # any other character is written in bytes
    prefix = model.get("continuing_subword_prefix") or ""
    return len(token.removeprefix(prefix)) == 1 or token == model.get("unk_token")


def _needed(model: dict[str, Any], ids: dict[str, int]) -> Callable[[int], set[int]]:
    """Function: id -> this id and the ids of all intermediate tokens of its merges."""
    if model["type"] != "BPE":
        return lambda id_: {id_}
    ranks = {tuple(pair): rank for rank, pair in enumerate(_pairs(model))}
    tokens = {id_: token for token, id_ in ids.items()}

    def needed(id_: int) -> set[int]:
        return {id_, *(ids[part] for part in _made(tokens[id_], ranks) if part in ids)}

    return needed


def _pairs(model: dict[str, Any]) -> Iterator[Sequence[str]]:
    for pair in model["merges"]:
        yield pair.split(" ") if isinstance(pair, str) else pair


def _made(token: str, ranks: dict[tuple[str, ...], int]) -> Iterator[str]:
    """All intermediate BPE pieces of a token; they are the same inside a longer text, because nothing merges across the
    ends of what becomes a token."""
    parts = list(token)
    yield from parts
    while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        yield parts[i]


def _cut_model(model: dict[str, Any], stays: set[str], place: dict[int, int]) -> None:
    """Keep only the tokens that stay, with their new ids, and the merges among them."""
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in place]
        if model.get("unk_id") is not None:
            model["unk_id"] = place[model["unk_id"]]
        return
    model["vocab"] = {token: place[old] for token, old in model["vocab"].items() if old in place}
    if model["type"] == "BPE":
        model["merges"] = [list(p) for p in _pairs(model) if {p[0], p[1], p[0] + p[1]} <= stays]


def _renumbered(processor: Any, place: dict[int, int]) -> Any:
    """A post-processor with the new ids of the tokens that it adds."""
    if isinstance(processor, list):
        return [_renumbered(item, place) for item in processor]
    if not isinstance(processor, dict):
        return processor
    result = {key: _renumbered(item, place) for key, item in processor.items()}
    for key in ("sep", "cls"):  # [token, id]
        if isinstance(processor.get(key), list):
            result[key] = [processor[key][0], place[processor[key][1]]]
    if isinstance(processor.get("ids"), list):
        result["ids"] = [place[id_] for id_ in processor["ids"]]
    return result
