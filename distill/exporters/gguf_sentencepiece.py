"""A SentencePiece-like BPE tokenizer in GGUF: tokens with scores in place of merges, as in Gemma, Llama 2 and Phi 3.

llama.cpp joins the pair of neighbours whose text has the highest score; ``tokenizer.json`` has a list of merges, and
the pair that comes first in it is joined. Both are the same with

    score(token) = - (place of its first merge in the list)

if the merges of a token follow each other in the list, and every way to cut it into two tokens is one of them. Merge
lists converted from a SentencePiece model meet both conditions; others are refused.

Source: https://github.com/ggml-org/llama.cpp, ``llm_tokenizer_spm`` in src/llama-vocab.cpp; Kudo & Richardson 2018,
arXiv 1808.06226 (SentencePiece).
"""

from __future__ import annotations

import re
from typing import Any

SPACE = "\u2581"
"""What SentencePiece writes for a space."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def is_sentencepiece(state: dict[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is BPE over characters, with bytes for those that it lacks."""
    return state["model"]["type"] == "BPE" and bool(state["model"].get("byte_fallback"))


def adds_space(state: dict[str, Any]) -> bool | None:
    """Whether a space is put in front of each text; None if the text is changed in a way that llama.cpp lacks.

    Args:
        state: a ``tokenizer.json``.
    """
    normalizer, splitter = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    if splitter.get("type") == "Metaspace":
        is_plain = splitter["replacement"] == SPACE and not splitter.get("split", True) and not steps
        scheme = splitter.get("prepend_scheme", "always")
        # llama.cpp puts a space after each special token too, which the scheme "first" does not
        return scheme == "always" if is_plain and scheme != "first" else None
    # after the replacement no space is left at which this one could split
    if splitter and (splitter["type"] != "Split" or splitter["pattern"] != {"String": " "}):
        return None
    if kinds not in (["Replace"], ["Prepend", "Replace"]):
        return None
    replaces = steps[-1]["pattern"] == {"String": " "} and steps[-1]["content"] == SPACE
    return len(steps) == 2 if replaces and (len(steps) == 1 or steps[0]["prepend"] == SPACE) else None


def scores_of(state: dict[str, Any]) -> dict[str, float] | None:
    """Token -> score, for all tokens that merges make; None if scores cannot say what the merges say.

    Args:
        state: a ``tokenizer.json``.
    """
    vocabulary: dict[str, int] = state["model"]["vocab"]
    merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in state["model"]["merges"]]
    first: dict[str, int] = {}
    count: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        token = left + right
        first.setdefault(token, place)
        count[token] = count.get(token, 0) + 1
        if place - first[token] >= count[token]:  # another token's merge stands between
            return None
    added = {token["content"] for token in state["added_tokens"]}
    for token in vocabulary:
        if len(token) > 1 and token not in added and not BYTE.fullmatch(token) and token not in first:
            return None  # llama.cpp would make it, and merges do not
    for token, found in count.items():
        if found != sum(token[:i] in vocabulary and token[i:] in vocabulary for i in range(1, len(token))):
            return None
    return {token: -float(place) for token, place in first.items()}
