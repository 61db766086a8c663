"""Training rows that repeat others or hold rows of a test set are left out, by rules that are checked one by one."""

import copy
import json

import numpy as np
import pytest
from pydantic import ValidationError

from distill.core.errors import InputError
from distill.data.base import Document
from distill.data.corpus import Corpus
from distill.data.near_duplicates import NearDuplicates, signature_of
from distill.data.overlap import TestRows
from distill.data.spec import DataSpec
from distill.data.words import runs_of, words_of

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"


def text_of(seed, length=80):
    """Words that no other text has."""
    return " ".join(f"w{seed}x{place}" for place in range(length))


def changed(text, *places):
    """The text with other words at some places."""
    words = text.split()
    for place in places:
        words[place] = f"other{place}"
    return " ".join(words)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(path, some):
    return {"kind": "jsonl", "path": write(path, [{"text": text} for text in some])}


@pytest.fixture
def opened(tmp_path, tokenizer):
    """Opens a text with its cleaning, in a folder that stays."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE

    def open_(train, clean, **more):
        valid = texts(tmp_path / "valid.jsonl", [text_of("valid")])
        more = {"validation": valid, "sequence_length": 16} | more
        more = {key: value for key, value in more.items() if value is not None}
        plain = {"train": train, **more} | ({"clean": clean} if clean else {})
        data = DataSpec.model_validate(plain)
        return Corpus.open(data, tokenizer, tmp_path / "data", seed=1, vocabulary_size=400)

    return open_


def kept(corpus, part=None):
    tokens = corpus.train.tokens if part is None else corpus.train.tokens.parts[part].tokens
    return tokens.num_documents, tokens.tally.removed


def test_equal_texts_stay_once_and_are_named(tmp_path, opened):
    some = [text_of(0), text_of(1), f"  {text_of(0).upper()}\n", text_of(1), changed(text_of(1), 3)]
    train = texts(tmp_path / "rows.jsonl", some)
    assert kept(opened(train, None)) == (5, {})
    corpus = opened(train, {"duplicates": "exact"})
    assert kept(corpus) == (3, {"repeated": 2})
    rows = f"{tmp_path}/rows.jsonl"
    assert corpus.notes() == [
        f"data.train: data.clean left out 2 of 5 rows (40.0%): 2 repeated (first {rows}:3 as {rows}:1, {rows}:4 as "
        f"{rows}:2)"
    ]
    # they may be more than rows that cannot be used
    assert corpus.train.tokens.tally.num_dropped == 0


def test_near_duplicates_are_those_that_share_most_of_their_shingles(tmp_path, opened):
    long = text_of(0, 400)
    some = [long, changed(long, 50, 200), changed(long, *range(0, 400, 12)), text_of(1, 30), changed(text_of(1, 30), 2)]
    train = texts(tmp_path / "rows.jsonl", some)
    assert kept(opened(train, {"duplicates": "exact"})) == (5, {})
    # two words of 400 take 10 of 396 shingles; every twelfth word takes 5 of 12; 30 words are too few
    assert kept(opened(train, {"duplicates": "near"})) == (4, {"nearly repeated": 1})


def test_the_signature_estimates_the_share_in_common():
    draw = np.random.default_rng(0)
    for changes in (3, 20, 60):
        one = text_of(changes, 600)
        two = changed(one, *draw.choice(600, changes, replace=False))
        shingles = [set(runs_of(words_of(text), 5).tolist()) for text in (one, two)]
        jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        agreeing = (signature_of(words_of(one)) == signature_of(words_of(two))).mean()
        assert agreeing == pytest.approx(jaccard, abs=3.5 * (jaccard * (1 - jaccard) / 112) ** 0.5)


def asked(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def test_conversations_nearly_repeat_others_by_their_answers_alone(tmp_path, opened):
    answer, question = text_of(0, 100), text_of(1, 100)
    rows = [
        asked(question, answer),
        asked(question, changed(answer, 40)),  # the same question, nearly the same answer
        asked(f" {question.upper()}", changed(answer, 60)),
        asked(changed(question, 40), answer),  # another question, whatever its answer
        asked(changed(question, 40), changed(answer, 40)),  # as the one before
        asked(question, text_of(2, 100)),  # another answer
        asked(question, text_of(3, 20)),
        asked(question, changed(text_of(3, 20), 4)),  # answers too short to be compared
        asked(question, changed(answer, 40), tools=[{"type": "function", "function": {"name": "f"}}]),
    ]
    file = write(tmp_path / "chat.jsonl", rows)
    train = {"kind": "chat", "path": file}
    held = {"kind": "chat", "path": write(tmp_path / "held.jsonl", [asked("what", text_of(9))])}
    more = {"validation": held, "sequence_length": 2000}
    assert kept(opened(train, {"duplicates": "exact"}, **more)) == (9, {})
    corpus = opened(train, {"duplicates": "near"}, **more)
    assert kept(corpus) == (6, {"nearly repeated": 3})
    assert corpus.train.tokens.tally.examples == {
        "nearly repeated": [f"{file}:{at} as {file}:{like}" for at, like in ((2, 1), (3, 1), (5, 4))]
    }


def test_near_duplicates_among_many_and_none_among_strangers():
    near = NearDuplicates()
    for seed in range(1100):  # more than there is room for at first
        assert near.find_or_keep(f"{seed}", words_of(text_of(seed))) is None
    for seed in range(0, 1100, 7):
        assert near.find_or_keep("new", words_of(changed(text_of(seed), 0))) == f"{seed}"
    # what is far below the threshold is kept, though it shares a third
    assert near.find_or_keep("new", words_of(changed(text_of(5), *range(0, 80, 9)))) is None


@pytest.mark.parametrize(("jaccard", "is_found"), [(0.9, True), (0.5, False)])
def test_the_threshold_lies_between(jaccard, is_found):
    """Of 100 pairs, each with so much in common, nearly all or nearly none are found."""
    found = 0
    for seed in range(100):
        near, one = NearDuplicates(), text_of(seed, 600)
        near.find_or_keep("one", words_of(one))
        # a changed word takes 5 shingles of each side, which leaves (596 - 5 n) / (596 + 5 n) in common
        changes = round(596 * (1 - jaccard) / (1 + jaccard) / 5)
        places = range(3, 3 + 6 * changes, 6)
        found += near.find_or_keep("two", words_of(changed(one, *places))) is not None
    assert found >= 98 if is_found else found <= 5


def test_a_test_row_is_found_by_half_of_its_words_in_one_row():
    question = "how many apples does ada have after she gives three of her ten apples to bob and then eats two of them"
    tests = TestRows(
        [Document("test:1", question), Document("test:2", text_of(9)), Document("test:3", "why is it so?")]
    )

    def hit(text):
        found = tests.find(Document("row", text), words_of(text))
        return found and (found.id, round(found.share, 3))

    words = question.split()  # 22
    assert len(words) == 22
    assert hit(f"Q: {question.upper()}? {text_of(1)}") == ("test:1", 1.0)
    assert hit(f"{text_of(1)} {' '.join(words[:12])} {text_of(2)}") == ("test:1", 0.545)
    assert hit(f"{text_of(1)} {' '.join(words[:11])} {text_of(2)}") is None  # half is not more than half
    # runs that overlap are not counted twice, and two places of a row count together
    assert hit(f"{' '.join(words[:8])} so {' '.join(words[14:])}") == ("test:1", 0.727)
    assert hit(" ".join([*words[:7], "so", *words[7:14], "so", *words[14:21]])) is None  # no run of eight
    # a test row without a run of eight is found whole alone
    assert hit("Why  is it so?") == ("test:3", 1.0)
    assert hit("Tell me, why is it so?") is None


def test_words_of_scripts_without_spaces_are_characters():
    assert len(words_of("東京で寿司を食べる")) == 9
    assert len(words_of("don't stop, Straße!")) == 4
    assert words_of("STRASSE").tolist() == words_of("straße").tolist()
    text = "昨日の夜に東京の駅で友達と会いました"
    tests = TestRows([Document("test", text)])
    row = f"問題: {text}。答え"
    assert tests.find(Document("row", row), words_of(row)) == ("test", 1.0)


def test_rows_of_a_test_set_and_of_validation_are_left_out(tmp_path, opened):
    exam = texts(tmp_path / "exam.jsonl", [text_of("exam", 20)])
    some = [text_of(0), f"{text_of(1)} {text_of('exam', 20)}", changed(text_of("valid"), 40), text_of(2)]
    train = texts(tmp_path / "rows.jsonl", some)
    of_exam = opened(train, {"decontaminate": [exam]})
    assert kept(of_exam) == (3, {"in a test set": 1})
    rows = tmp_path / "rows.jsonl"
    assert f"1 in a test set (first {rows}:2 it holds 100% of {tmp_path}/exam.jsonl:1)" in of_exam.summary()
    both = opened(train, {"decontaminate": ["validation", exam]})
    assert kept(both) == (2, {"in a test set": 2})
    # what is measured is the same with and without
    assert both.validation.tokens.num_tokens == opened(train, None).validation.tokens.num_tokens


def test_another_cleaning_is_another_text_and_the_same_one_is_read_no_more(tmp_path, opened, monkeypatch):
    exam = texts(tmp_path / "exam.jsonl", [text_of("exam", 20)])
    train = texts(tmp_path / "rows.jsonl", [text_of(0), text_of(0), text_of("exam")])
    cleanings = [None, {"duplicates": "exact"}, {"duplicates": "near"}, {"decontaminate": [exam]}]
    hashes = [opened(train, clean).hash for clean in cleanings]
    texts(tmp_path / "exam.jsonl", [text_of("another", 20)])
    corpus = opened(train, {"decontaminate": [exam]})
    assert kept(corpus) == (3, {})
    assert len({*hashes, corpus.hash}) == 5
    monkeypatch.setattr("distill.data.clean.Cleaner.training", None)
    again = opened(train, {"duplicates": "exact"})
    assert again.hash == hashes[1]
    assert kept(again) == (2, {"repeated": 1})


def test_sources_of_a_mixture_are_cleaned_together_also_where_one_is_tokenized_already(tmp_path, opened):
    sources = {
        "a": texts(tmp_path / "a.jsonl", [text_of(0), text_of(1), text_of(2)]),
        "b": texts(tmp_path / "b.jsonl", [text_of(3), text_of(1), text_of(4)]),
    }
    valid = {name: texts(tmp_path / f"valid-{name}.jsonl", [text_of(f"valid{name}")]) for name in sources}
    train = {"kind": "mixture", "sources": sources, "validation": valid, "max_repeats": 9}
    corpus = opened(train, {"duplicates": "exact"}, validation=None)
    assert [kept(corpus, part) for part in (0, 1)] == [(3, {}), (2, {"repeated": 1})]
    assert any(line.startswith("data.train, b: data.clean left out 1 of 3 rows") for line in corpus.notes())
    ids = np.array(corpus.train.tokens.ids())
    for file in (tmp_path / "data").glob("train.sources.b-*"):
        file.unlink()
    for file in (tmp_path / "data").glob("train-*"):
        file.unlink()
    again = opened(train, {"duplicates": "exact"}, validation=None)
    assert kept(again, 1) == (2, {"repeated": 1})
    assert np.array_equal(ids, again.train.tokens.ids())
    # in the other order it is the other source that repeats
    turned = {"kind": "mixture", "sources": dict(reversed(sources.items())), "validation": valid, "max_repeats": 9}
    other = opened(turned, {"duplicates": "exact"}, validation=None)
    assert [kept(other, part) for part in (0, 1)] == [(3, {}), (2, {"repeated": 1})]


def test_conversations_are_the_same_where_a_model_reads_the_same(tmp_path, opened):
    short = [{"prompt": "Why?", "response": "So."}, {"prompt": "why?", "response": "so."}]
    other = [{"prompt": "Why? So.", "response": "Hm."}, {"system": "Be brief.", "prompt": "Why?", "response": "So."}]
    asked = [{"prompt": "what is two and two?", "response": text_of(1, 60)}]
    like_it = [{"prompt": "what is two and two?", "response": changed(text_of(1, 60), 30)}]
    train = {"kind": "chat", "path": write(tmp_path / "chat.jsonl", short + other + asked + like_it)}
    valid = {"kind": "chat", "path": write(tmp_path / "v.jsonl", [{"prompt": "Who?", "response": "I."}])}
    more = {"validation": valid, "chat": {"template": TEMPLATE}, "sequence_length": 1024}
    corpus = opened(train, {"duplicates": "exact"}, **more)
    assert kept(corpus) == (5, {"repeated": 1})
    # a question that is too short for a run of eight is found as a message of its own
    exam = texts(tmp_path / "exam.jsonl", ["What is two and two?"])
    corpus = opened(train, {"decontaminate": [exam]}, **more)
    assert kept(corpus) == (4, {"in a test set": 2})


def test_what_leaves_nothing_says_so(tmp_path, opened):
    exam = texts(tmp_path / "exam.jsonl", [text_of(0)])
    with pytest.raises(InputError, match=r"empty corpus: 0 tokens .*; data\.clean left out 2 rows"):
        opened(texts(tmp_path / "rows.jsonl", [text_of(0), text_of(0)]), {"decontaminate": [exam]})
    (tmp_path / "exam.jsonl").write_text("{}\n" * 3, encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.clean\.decontaminate\.0: 3 of 3 rows cannot be used .*no such column"):
        opened(texts(tmp_path / "rows.jsonl", [text_of(0)]), {"decontaminate": [exam]})


@pytest.mark.parametrize(
    ("train", "clean", "what"),
    [
        ({"kind": "hub", "path": "a/b", "streaming": True}, {"duplicates": "exact"}, "set streaming: false"),
        ({"kind": "tokens", "path": "a"}, {"duplicates": "near"}, "token ids have none; use duplicates: exact alone"),
        ({"kind": "tokens", "path": "a"}, {"decontaminate": ["validation"]}, "token ids have none"),
        ("python_docs", {}, "has no effect so"),
        (
            "python_docs",
            {"decontaminate": [{"kind": "tokens", "path": "a"}]},
            "decontaminate.0: token ids have no words",
        ),
        ("python_docs", {"decontaminate": [{"kind": "hub", "path": "a/b", "streaming": True}]}, "a stream has no end"),
        ("python_docs", {"decontaminate": ["mixture"]}, "no such source"),
    ],
)
def test_what_cannot_be_cleaned_is_refused(train, clean, what):
    with pytest.raises(ValidationError, match=what):
        DataSpec.model_validate({"train": train, "sequence_length": 16, "clean": clean})
