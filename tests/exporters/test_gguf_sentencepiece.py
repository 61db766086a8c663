"""Scores in place of merges: the algorithm of llama.cpp, written apart, cuts text as the tokenizer does."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from distill.exporters.gguf_sentencepiece import SPACE, adds_space, is_sentencepiece, scores_of

TEXT = "the student learns what its teacher knows; the teacher  knows\n\nmore. aaa aaaa naïve über 1234 ¼ "
PREPEND = normalizers.Prepend(SPACE)
REPLACE = normalizers.Replace(" ", SPACE)


def tokenizer(normalizer: Any = REPLACE, pre_tokenizer: Any = None) -> Tokenizer:
    """A tokenizer as one that is made from a SentencePiece model: bytes, and a merge for each way to cut a token."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = REPLACE
    trained.train_from_iterator([TEXT * 3], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    order = list(dict.fromkeys("".join(pair) for pair in learned["merges"]))
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(learned["vocab"]) - {*order}), *order]
    known = set(tokens)
    merges = [
        (token[:i], token[i:]) for token in order for i in range(1, len(token)) if {token[:i], token[i:]} <= known
    ]
    made = Tokenizer(
        models.BPE(dict(zip(tokens, range(len(tokens)), strict=True)), merges, unk_token="<unk>", byte_fallback=True)
    )
    made.add_special_tokens(["<unk>"])
    made.normalizer, made.decoder = normalizer, decoders.ByteFallback()
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


def state_of(made: Tokenizer) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(made.to_str())
    return state


def cut(text: str, state: dict[str, Any]) -> list[int]:
    """llama.cpp's algorithm: join the neighbours of the highest score, the leftmost of equals, until none is known."""
    vocabulary, scores = state["model"]["vocab"], scores_of(state)
    assert scores is not None
    parts = [*text.replace(" ", SPACE)]
    while True:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        known = [(score, i) for score, i in pairs if score is not None]
        if not known:
            break
        at = -max(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        ids += [vocabulary[part]] if part in vocabulary else [vocabulary[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


def test_scores_cut_text_as_merges_do() -> None:
    made, chance = tokenizer(), random.Random(0)
    state = state_of(made)
    assert is_sentencepiece(state)
    texts = [TEXT, "", "\n\n\n\n", "日本 ¼½", *("".join(chance.choices(TEXT, k=40)) for _ in range(300))]
    for text in texts:
        assert cut(text, state) == made.encode(text, add_special_tokens=False).ids


def test_merges_that_scores_cannot_say_are_refused() -> None:
    state = state_of(tokenizer())
    assert scores_of(state) is not None
    merges = state["model"]["merges"]
    several = next(i for i, (a, b) in enumerate(merges[1:], 1) if a + b == "".join(merges[i - 1]))

    def changed(some: list[Any], **more: Any) -> dict[str, Any]:
        return {**state, "model": {**state["model"], "merges": some, **more}}

    assert scores_of(changed(merges[:several] + merges[several + 1 :])) is None  # a way to cut a token is no merge
    apart = merges[:several] + merges[several + 1 :] + [merges[several]]
    assert scores_of(changed(apart)) is None  # merges of other tokens stand between
    more = state["model"]["vocab"] | {"xyz": len(state["model"]["vocab"])}
    assert scores_of(changed(merges, vocab=more)) is None  # a token that no merge makes
    as_text = [" ".join(pair) for pair in merges]
    assert scores_of(changed(as_text)) == scores_of(state)


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "expected"),
    [
        (REPLACE, None, False),
        (REPLACE, pre_tokenizers.Split(" ", "merged_with_previous"), False),
        (normalizers.Sequence([PREPEND, REPLACE]), None, True),
        (None, pre_tokenizers.Metaspace(split=False), True),
        (None, pre_tokenizers.Metaspace(split=False, prepend_scheme="never"), False),
        (None, pre_tokenizers.Metaspace(split=False, prepend_scheme="first"), None),
        (None, pre_tokenizers.Metaspace(split=True), None),
        (normalizers.Sequence([normalizers.NFKC(), REPLACE]), None, None),
        (REPLACE, pre_tokenizers.Digits(), None),
        (None, None, None),
    ],
)
def test_what_is_done_to_a_text_before_its_merges(normalizer: Any, pre_tokenizer: Any, expected: bool | None) -> None:
    made = tokenizer(normalizer, pre_tokenizer)
    assert adds_space(state_of(made)) is expected
    if expected is not None:
        cuts = cut((" " if expected else "") + "the student", state_of(tokenizer()))
        assert made.encode("the student", add_special_tokens=False).ids == cuts
