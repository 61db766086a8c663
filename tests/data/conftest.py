"""A small tokenizer and a corpus that the tests of this folder share."""

import json

import pytest

from distill.data.tokenizer import train_tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "naïve",
    "cafés",
    "in",
    "東京",
    "sell",
    "🍣",
    "and",
    "Straßenmusik",
    "plays",
]


def _text_of(number: int) -> str:
    """A text of its own for each number, with characters of one to four bytes."""
    return (
        " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(20 + number % 9))
        + f" №{number}"
    )


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return train_tokenizer((_text_of(i) for i in range(200)), 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture
def rows(tmp_path):
    """Path of a JSON Lines file with 60 documents."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": _text_of(i)}) + "\n" for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def text_of():
    """The function from a number to a text."""
    return _text_of
