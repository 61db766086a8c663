"""Training documents that nearly repeat validation text are counted and told, and stay in the text."""

import json

import numpy as np
import pytest

from distill.data import corpus, repeats
from distill.data.corpus import Corpus
from distill.data.spec import DataSpec
from distill.data.split import Split

LINE = (
    "data.train: 1 of 41 documents that were compared nearly repeat validation text (first {path}:4: {share} of the "
    "words of {valid}:2); data.clean.decontaminate: [validation] leaves them out"
)


def words(seed, length=40):
    """A text whose words no other text has."""
    return " ".join(f"w{seed}x{place}" for place in range(length))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {"kind": "jsonl", "path": str(path)}


@pytest.fixture
def opened(tmp_path, tokenizer):
    """Opens a text whose fourth training document is the second of validation with one word changed."""

    def open_(changed, folder="data", length=40, **more):
        valid = [words("v", length), words("u", length)]
        train = [words(number) for number in range(40)]
        other = valid[1].split()
        for place in changed:
            other[place] = f"other{place}"
        train.insert(3, " ".join(other))
        data = {
            "train": write(tmp_path / "train.jsonl", train),
            "validation": write(tmp_path / "valid.jsonl", valid),
            "sequence_length": 16,
        } | more
        return Corpus.open(DataSpec.model_validate(data), tokenizer, tmp_path / folder, seed=1, vocabulary_size=400)

    return open_


def told(capfd):
    return [line for line in capfd.readouterr().err.splitlines() if "repeat validation text" in line]


def line(tmp_path, share="98%"):
    return LINE.format(path=tmp_path / "train.jsonl", valid=tmp_path / "valid.jsonl", share=share)


@pytest.mark.parametrize("place", [0, 20, 39])
def test_one_changed_word_is_told_and_changes_no_token(opened, tmp_path, capfd, monkeypatch, place):
    watched = opened([place])
    assert told(capfd) == [line(tmp_path)]
    opened([place])  # the tokens are there
    assert told(capfd) == []
    monkeypatch.setattr(corpus, "can_repeat", lambda texts, is_cleaned: False)
    plain = opened([place], "plain")
    assert told(capfd) == []
    assert watched.hash == plain.hash
    assert np.array_equal(watched.train.ids(), plain.train.ids())
    assert np.array_equal(watched.train.tokens.bounds(), plain.train.tokens.bounds())


@pytest.mark.parametrize(
    "case",
    [
        {"changed": range(0, 40, 6)},  # a text of its own
        {"changed": [20], "length": 15},  # too short to say much
        {"changed": [20], "clean": {"decontaminate": ["validation"]}},  # which leaves it out
    ],
)
def test_nothing_is_told_where_there_is_nothing_to_do(opened, capfd, case):
    opened(
        [place for place in case["changed"] if place < case.get("length", 40)],
        **{key: value for key, value in case.items() if key != "changed"},
    )
    assert told(capfd) == []


def test_what_is_compared_is_bounded(opened, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(repeats, "CHARACTERS", 1000)  # a document has about 200 characters
    compared = []
    find = repeats.TestRows.find
    monkeypatch.setattr(repeats.TestRows, "find", lambda self, *some: compared.append(1) or find(self, *some))
    opened([20])
    assert 5 < len(compared) < 20
    [said] = told(capfd)
    assert f"data.train: 1 of {len(compared)} documents that were compared" in said


def test_held_out_text_is_compared_too(tmp_path, tokenizer, capfd):
    pairs = [(words(number), words(number).replace(f"w{number}x20", "other")) for number in range(30)]
    source = write(tmp_path / "train.jsonl", [text for pair in pairs for text in pair])
    data = DataSpec.model_validate({"train": source, "held_out": 0.5, "sequence_length": 16})
    held_out = {item.text for item in Split(data).validation()}
    parted = sum(len({*pair} & held_out) == 1 for pair in pairs)
    assert parted > 5
    Corpus.open(data, tokenizer, tmp_path / "data", seed=1, vocabulary_size=400)
    [said] = told(capfd)
    assert said.startswith(f"data.train: {parted} of {60 - len(held_out)} documents that were compared")


def test_each_source_of_a_mixture_is_told_by_its_key(opened, tmp_path, capfd):
    one, valid = write(tmp_path / "one.jsonl", [words(f"a{i}") for i in range(9)]), str(tmp_path / "valid.jsonl")
    two = {"kind": "jsonl", "path": str(tmp_path / "train.jsonl")}
    mixture = {"kind": "mixture", "sources": {"one": one, "two": two}}
    mixture["validation"] = {"one": {"kind": "jsonl", "path": valid}}
    opened([20], train=mixture, validation=None)
    [said] = told(capfd)
    assert said.startswith("data.train.sources.two: 1 of ")
    assert f"of the words of {valid}:2" in said
