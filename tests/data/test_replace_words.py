"""Copies of documents with words replaced: by text, copy and seed alone, behind the documents, never of validation."""

import json
import re

import pytest
from pydantic import ValidationError

from distill.core.errors import InputError
from distill.data.augment_spec import ReplaceWords
from distill.data.base import Document, Rejected
from distill.data.corpus import Corpus
from distill.data.replace_words import TOGETHER, WORD, Copy, WordReplacer, in_case_of, replaced
from distill.data.spec import DataSpec

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"


class Other:
    """Knows two other words for each word that has no x."""

    def __init__(self, name="a"):
        self.name, self.asked = name, 0

    def identity(self):
        return [self.name]

    def find(self, texts, places, count):
        self.asked += len(texts)
        words = [[text[start:stop] for start, stop in some] for text, some in zip(texts, places, strict=True)]
        return [[[] if "x" in word else [f"{word}y", f"{word}z"][:count] for word in some] for some in words]


def copies_of(texts, folder, **spec):
    items = [Document(str(number), text) for number, text in enumerate(texts)]
    made = list(WordReplacer(ReplaceWords(**spec), Other(), folder).with_copies(items))
    assert made[: len(items)] == items
    return made[len(items) :]


def test_words_are_runs_of_letters_and_no_parts_of_others():
    assert WORD.findall("The café's foo_bar x2 isn't a half-done ÜBER 東京。") == [
        "The",
        "half",
        "done",
        "ÜBER",
        "東京",
    ]


@pytest.mark.parametrize(
    ("word", "other", "expected"),
    [
        ("the", "Cat", "cat"),
        ("The", "cat", "Cat"),
        ("THE", "Cat", "CAT"),
        ("iPad", "cat", "cat"),
        ("東京", "大阪", "大阪"),
    ],
)
def test_a_word_keeps_its_case(word, other, expected):
    assert in_case_of(word, other) == expected


def test_words_are_replaced_where_they_stand_and_all_else_stays():
    text = "One, two;\n  three."
    places = [match.span() for match in WORD.finditer(text)]
    drawn = list(zip(places, (0.0, 0.99, 0.5), strict=True))
    assert replaced(text, drawn, [["uno", "un"], ["dos", "deux"], []]) == ("Uno, deux;\n  three.", 2)


def test_a_share_of_the_words_is_replaced_and_each_candidate_is_drawn(tmp_path):
    texts = [" ".join(f"{a}{b}" for a in "abcdefgh" for b in "klmnop") + f" {number}" for number in range(40)]
    copies = copies_of(texts, tmp_path, probability=0.3, copies=2)
    assert len(copies) == 80
    words, changed = (sum(getattr(copy, name) for copy in copies) for name in ("num_words", "num_replaced"))
    assert words == 80 * 48
    assert changed / words == pytest.approx(0.3, abs=0.03)  # 4 standard errors
    last = [word[-1] for copy in copies for word in re.findall(r"[a-h][k-p][yz]", copy.text)]
    assert len(last) == changed
    assert last.count("y") / len(last) == pytest.approx(0.5, abs=0.06)
    assert all(copy.text != other.text for copy, other in zip(copies[:40], copies[40:], strict=True))


def test_what_is_replaced_depends_on_text_copy_and_seed_alone(tmp_path):
    texts = [f"some words of text number {number} and xx" for number in range(TOGETHER + 3)]
    straight = copies_of(texts, tmp_path, copies=2)
    back = copies_of(texts[::-1], tmp_path, copies=2)
    assert {copy.text for copy in straight} == {copy.text for copy in back}
    assert copies_of(texts, tmp_path, copies=1) == straight[: len(straight) // 2]
    assert copies_of(texts, tmp_path, copies=1, seed=1) != copies_of(texts, tmp_path, copies=1)
    assert not [*tmp_path.iterdir()]


def test_what_is_no_document_and_what_has_no_word_is_not_copied(tmp_path):
    items = [Document("a", "12 xx 34"), Rejected("b", "wrong", "wrong"), Document("c", "whole words here")]
    made = list(WordReplacer(ReplaceWords(probability=1), Other(), tmp_path).with_copies(items))
    assert made[:3] == items
    assert [copy.id for copy in made[3:]] == ["c (copy 1)"]
    assert made[3].num_words == made[3].num_replaced == 3


@pytest.fixture
def open_(tmp_path, tokenizer, text_of):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(60)) + "{\n", encoding="utf-8")

    def opened(augment=None, candidates=None, **more):
        data = {"train": {"kind": "jsonl", "path": str(path)}, "sequence_length": 32, "held_out": 0.2, "max_dropped": 1}
        data = DataSpec.model_validate(
            data | more | ({} if augment is None else {"augment": {"replace_words": augment}})
        )
        return Corpus.open(data, tokenizer, tmp_path / "data", 3, 400, candidates)

    return opened


def test_training_text_is_added_and_kept_and_validation_stays(open_):
    plain, candidates = open_(), Other()
    more = open_({"copies": 3}, candidates)
    assert more.hash != plain.hash
    assert more.validation.tokens.path == plain.validation.tokens.path
    documents = plain.train.tokens.num_documents
    assert more.train.tokens.num_documents == 4 * documents
    assert candidates.asked == 3 * documents
    ids, bounds = more.train.tokens.ids(), more.train.tokens.bounds()
    assert (ids[: bounds[documents]] == plain.train.tokens.ids()).all()  # copies follow
    copies = more.train.tokens.tally.copies
    assert copies["num"] == 3 * documents
    assert 0.3 < copies["replaced"] / copies["words"] < 0.5
    (line,) = [line for line in more.notes() if "data.augment" in line]
    assert line.startswith(f"data.train: data.augment added {3 * documents} copies of documents, in which ")
    assert more.train.tokens.tally.num_read == plain.train.tokens.tally.num_read  # of which max_dropped is a share
    again = open_({"copies": 3}, candidates)
    assert again.train.tokens.path == more.train.tokens.path
    assert candidates.asked == 3 * documents
    others = [open_({"copies": 3, "seed": 1}, Other()), open_({"copies": 3}, Other("b"))]
    assert len({more.hash, *(other.hash for other in others)}) == 3


@pytest.mark.parametrize("packing", ["wrapped", "documents", "best_fit", "padded"])
def test_calibration_reads_no_copy(open_, packing):
    corpus = open_({"copies": 2}, Other(), packing=packing)
    end = corpus.train.tokens.end_of_originals()
    rows = corpus.train.originals()
    assert 0 < len(rows) < len(corpus.train)
    assert all(start + size <= end for row in range(len(rows)) for start, size in rows.pieces(row))
    plain = open_(packing=packing)
    assert plain.train.originals() is plain.train
    calibrated = sum(len(batch["input_ids"]) for batch in corpus.calibration_loader(10_000))
    assert calibrated == len(rows)


def test_a_model_that_knows_no_word_is_refused(open_):
    class Nothing(Other):
        def find(self, texts, places, count):
            return [[[] for _ in some] for some in places]

    for _ in range(2):  # also where the tokens are there already
        with pytest.raises(InputError, match=r"data\.train: data\.augment could replace no word of it"):
            open_({"copies": 2}, Nothing())


def test_rows_that_cleaning_leaves_out_are_not_copied(open_, tmp_path, text_of):
    rows = [{"text": text_of(i % 20)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = open_({}, Other(), clean={"duplicates": "exact"})
    assert corpus.train.tokens.num_documents == 2 * (corpus.train.tokens.tally.num_used)
    assert corpus.train.tokens.tally.num_removed > 20


def test_in_a_mixture_documents_are_copied_and_conversations_stay(tmp_path, tokenizer, text_of):
    chats = [{"prompt": f"{text_of(100 + i)}?", "response": text_of(200 + i)[:60]} for i in range(30)]
    for name, rows in (("texts", [{"text": text_of(i)} for i in range(40)]), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = {"texts": {"kind": "jsonl", "path": str(tmp_path / "texts.jsonl")}}
    sources["chats"] = {"kind": "chat", "path": str(tmp_path / "chats.jsonl")}
    train = {"kind": "mixture", "sources": sources}
    data = {"train": train, "sequence_length": 128, "held_out": 0.2, "chat": {"template": TEMPLATE}}
    data = DataSpec.model_validate(data | {"augment": {"replace_words": {}}})
    tokenizer.chat_template = TEMPLATE
    corpus = Corpus.open(data, tokenizer, tmp_path / "data", 3, 400, Other())
    texts, chats = (part.tokens for part in corpus.train.tokens.parts)
    assert texts.tally.copies["num"] == texts.tally.num_used
    assert not chats.tally.copies
    assert sum("data.augment" in line for line in corpus.notes()) == 1


def test_copies_are_documents_of_their_own_type():
    assert not isinstance(Document("a", "b"), Copy)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"train": {"kind": "hub", "path": "a/b", "streaming": True}}, "augment: a stream has no end"),
        ({"train": {"kind": "tokens", "path": "a.npy"}}, "augment: token ids have no words"),
        ({"train": {"kind": "chat", "path": "a.jsonl"}}, "augment: only documents are copied"),
        ({"augment": {"replace_words": {"candidates": "masked_lm"}}}, "masked_lm needs an encoder"),
        ({"augment": {"replace_words": {"probability": 0}}}, "greater than 0"),
        ({"augment": {}}, "Field required"),
    ],
)
def test_what_cannot_be_augmented_is_refused(more, what):
    plain = {"train": "python_docs", "sequence_length": 16, "augment": {"replace_words": {}}}
    with pytest.raises(ValidationError, match=what):
        DataSpec.model_validate(plain | more)
