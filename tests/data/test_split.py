"""The split: the two sides never share a text."""

import json

import pytest
from pydantic import ValidationError

from distill.core.errors import InputError
from distill.data.python_docs import PythonDocs
from distill.data.spec import DataSpec, TrainTokenizer
from distill.data.split import Split


def data(path, **more):
    return DataSpec.model_validate({"train": {"kind": "jsonl", "path": str(path)}, "sequence_length": 16} | more)


def sides(spec):
    split = Split(spec)
    return [d.text for d in split.training()], [d.text for d in split.validation()]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_sides_share_nothing_and_lose_nothing_even_with_duplicates(tmp_path, text_of):
    texts = [text_of(i % 100) for i in range(250)]
    train, validation = sides(data(write(tmp_path / "x.jsonl", texts), held_out=0.3))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert 15 <= len(set(validation)) <= 45  # 30 of 100, give or take three standard deviations


def test_a_text_stays_on_its_side_when_rows_move(tmp_path, text_of):
    texts = [text_of(i) for i in range(80)]
    _, before = sides(data(write(tmp_path / "x.jsonl", texts), held_out=0.2))
    _, after = sides(data(write(tmp_path / "y.jsonl", [*texts[40:], "new", *texts[:40]]), held_out=0.2))
    assert set(before) == set(after) - {"new"}


def test_a_growing_share_only_adds(rows):
    _, few = sides(data(rows, held_out=0.1))
    _, many = sides(data(rows, held_out=0.4))
    assert set(few) < set(many)


def test_python_docs_split_by_name():
    spec = DataSpec(train=PythonDocs(), sequence_length=16)
    split = Split(spec)
    train, validation = ({d.id for d in side} for side in (split.training(), split.validation()))
    assert not train & validation
    assert len(train | validation) == len(list(PythonDocs().documents()))
    assert 0.02 < len(validation) / len(train | validation) < 0.09


def test_two_documents_are_enough_for_two_sides_and_one_is_not(tmp_path):
    train, validation = sides(data(write(tmp_path / "x.jsonl", ["one", "two"]), held_out=1e-9))
    assert {*train, *validation} == {"one", "two"}
    assert len(train) == len(validation) == 1
    with pytest.raises(InputError, match="one document cannot be split"):
        sides(data(write(tmp_path / "y.jsonl", ["one", "one"]), held_out=1e-9))
    with pytest.raises(InputError, match="empty corpus"):
        sides(data(write(tmp_path / "z.jsonl", []), held_out=1e-9))


def test_training_leaves_out_what_the_validation_source_has(tmp_path):
    train_path = write(tmp_path / "x.jsonl", ["a", "b", "c", "b"])
    validation_path = write(tmp_path / "y.jsonl", ["b", "d"])
    split = Split(data(train_path, validation={"kind": "jsonl", "path": str(validation_path)}))
    assert [d.text for d in split.training()] == ["a", "c"]
    assert split.num_repeated == 2
    assert [d.text for d in split.validation()] == ["b", "d"]


ALIKE = ["The cat sat.", "the  cat\tsat. ", "\nTHE CAT SAT.\r\n", "\uff34he cat sat.", "The cat\u00a0sat."]
APART = ["The cat sat", "Thecat sat.", "The cat sat. It"]


def test_training_leaves_out_what_differs_from_validation_by_case_spaces_or_unicode_form(tmp_path):
    train_path = write(tmp_path / "x.jsonl", [*ALIKE, *APART, "Stra\u00dfe", "e\u0301te\u0301"])
    validation_path = write(tmp_path / "y.jsonl", ["The cat sat.", "STRASSE", "\u00c9t\u00e9"])
    spec = data(train_path, validation={"kind": "jsonl", "path": str(validation_path)})
    split = Split(spec)
    assert [d.text for d in split.training()] == APART
    assert split.num_repeated == 7


@pytest.mark.parametrize("seed", range(8))
def test_such_texts_are_held_out_together(tmp_path, text_of, seed):
    others = [text_of(100 * seed + i) for i in range(20)]
    texts = [one for text in others for one in (text, f" {text.upper()}\n")]
    train, validation = sides(data(write(tmp_path / "x.jsonl", texts), held_out=0.4))
    assert len(train) + len(validation) == len(texts)
    assert not {text.lower().strip() for text in train} & {text.lower().strip() for text in validation}


def test_spec_refuses_two_ways_to_validate_but_reads_its_own_dump_back(rows):
    source = {"kind": "jsonl", "path": str(rows)}
    with pytest.raises(ValidationError, match="held_out has no effect"):
        data(rows, validation=source, held_out=0.1)
    spec = data(rows, validation=source, tokenizer={"vocab_size": 300})
    assert DataSpec.model_validate(spec.model_dump()) == spec
    assert spec.tokenizer == TrainTokenizer(vocab_size=300)
    assert data(rows).tokenizer == "teacher"


def test_tokenizer_mistakes_point_at_their_key(rows):
    for wrong, place in (({"vocab_sze": 300}, "vocab_sze"), ({"vocab_size": 3}, "vocab_size"), (5, "tokenizer")):
        with pytest.raises(ValidationError) as error:
            data(rows, tokenizer=wrong)
        assert [item["loc"][-1] for item in error.value.errors()] == [place]
