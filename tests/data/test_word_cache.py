"""Words that are looked up have the ids that the tokenizer gives them, in every text and for every tokenizer."""

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from distill.data import word_cache
from distill.data.word_cache import PATTERNS, WordCache, words_of

PIECES = [
    *(" ", "  ", "\n", " \n", "\r\n", "\t", "\u00a0", "\x1c", "\x85", "\u2028", "\ufeff", "\u200b", "_", "-", "--"),
    *(
        "the",
        "quick",
        "don't",
        "we'LL",
        "'s",
        "'S",
        "5",
        "1234",
        "½",
        "²",
        "é",
        "e\u0301",
        "\u0301",
        "\u017f",
        "İ",
        "ß",
    ),
    *(
        ".",
        ",",
        "!?",
        '."',
        "”",
        "“",
        "…",
        "—",
        "(",
        ")",
        "東京",
        "한국",
        "🍣",
        "\u200d",
        "\u0627",
        "\u064e",
        "<|end|>",
        "<call>",
    ),
]


@pytest.fixture(scope="module")
def texts():
    chance = random.Random(1)
    return ["".join(chance.choice(PIECES) for _ in range(chance.randrange(30))) for _ in range(1500)]


def made(texts, pattern=None, digits=False, normalizer=None, added=()):
    tokenizer = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    first = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    first += [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_of]) if first else bytes_of
    tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(added))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("pattern", [None, *sorted(PATTERNS)])
@pytest.mark.parametrize("more", [{}, {"digits": True}, {"normalizer": normalizers.NFC()}, {"added": ["<call>"]}])
def test_ids_are_those_of_the_whole_texts(texts, pattern, more):
    tokenizer = made(texts, pattern, **more)
    cache = WordCache.of(tokenizer)
    assert cache is not None
    for start in range(0, len(texts), 300):
        some = texts[start : start + 300]
        whole = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        assert [ids.tolist() for ids in cache.encode(some)] == [encoding.ids for encoding in whole]
        cache._resting = 0
    assert cache._known
    assert max(map(len, cache._known)) <= word_cache.LONGEST


def test_a_text_is_cut_alike_in_both_ways(texts):
    assert [words_of(text) for text in texts] == [[w for w in word_cache._CUT.split(text) if w] for text in texts]
    assert words_of("Of mice,\n and  men ") == ["Of", " mice,\n and", "  men", " "]


def test_what_is_known_is_not_encoded_again(texts):
    tokenizer = made(texts)
    given = []

    class Watched:
        def encode_batch_fast(self, some, **more):
            given.append(list(some))
            return tokenizer.encode_batch_fast(some, **more)

    cache = WordCache(Watched())
    first = cache.encode(["the quick the quick, the"])
    assert sorted(given[0]) == [" quick", " the", ",", "the"]
    cache._resting = 0
    assert [ids.tolist() for ids in cache.encode(["the quick the quick, the"])] == [first[0].tolist()]
    assert given[1] == []


def test_it_rests_where_most_words_are_new_and_forgets_when_it_is_full(texts, monkeypatch):
    tokenizer = made(texts)
    cache = WordCache(tokenizer)
    cache.encode(["東京한국" * 20])
    assert cache._resting == word_cache.REST
    assert cache.encode(["the"])[0].tolist() == tokenizer.encode("the", add_special_tokens=False).ids
    assert cache._resting == word_cache.REST - 1
    assert not cache._known
    monkeypatch.setattr(word_cache, "MOST", 3)
    cache._resting = 0
    for text in ("a b c d" + " a b c d" * 9, "e" + " f e" * 9, "a" + " e a" * 9):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert [row.tolist() for row in cache.encode([text])] == [ids]
    assert {"a", " e"} <= set(cache._known)
    assert " b" not in cache._known


def changed(tokenizer, **changes):
    told = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(told | changes))


@pytest.mark.parametrize(
    "more",
    [
        {"pattern": r"\w+|\W+"},  # a word and the space behind it
        {"pattern": r" ?\w+ \w+|\s+"},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Prepend("_")},
        {"added": ["New York"]},
        {"added": ["U.S."]},
        {"added": [AddedToken("<x>", rstrip=True)]},
        {"added": [AddedToken("word", single_word=True)]},
    ],
    ids=str,
)
def test_a_tokenizer_that_may_reach_across_a_cut_is_left_alone(texts, more):
    assert WordCache.of(made(texts, **more)) is None


def test_other_models_are_left_alone(texts):
    plain = made(texts)
    told = json.loads(plain.to_str())
    assert WordCache.of(plain) is not None
    assert WordCache.of(changed(plain, model=told["model"] | {"dropout": 0.1})) is None
    assert WordCache.of(changed(plain, pre_tokenizer=told["pre_tokenizer"] | {"add_prefix_space": True})) is None
    assert WordCache.of(changed(plain, pre_tokenizer={"type": "Whitespace"})) is None
    assert WordCache.of(changed(plain, pre_tokenizer=None)) is None
    assert WordCache.of(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))) is None


def test_ids_are_arrays_of_their_own_type(texts):
    ids = WordCache(made(texts)).encode(["the quick", ""])
    assert [row.dtype for row in ids] == [np.uint32, np.uint32]
    assert len(ids[1]) == 0
