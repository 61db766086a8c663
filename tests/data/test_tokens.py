"""Token ids that were made before: read as they stand, checked against the tokenizer, measured in bytes of text."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.core.errors import InputError
from distill.data.base import Rejected
from distill.data.corpus import Corpus
from distill.data.encoder import TextEncoder
from distill.data.jsonl import Jsonl
from distill.data.spec import DataSpec
from distill.data.token_encoder import TokenEncoder
from distill.data.tokenizer import train_tokenizer
from distill.data.tokens import Tokens


@pytest.fixture
def ids(tokenizer, text_of):
    """Of 60 texts, with the end-of-text token."""
    return [row.tolist() for row in TextEncoder(tokenizer).encode([text_of(number) for number in range(60)])]


def opened(source, tokenizer, folder, **more):
    spec = DataSpec(train=source, sequence_length=8, held_out=0.2, validation_tokens=100_000, **more)
    return Corpus.open(spec, tokenizer, folder / "data", 0, len(tokenizer))


def read(source):
    return [item.ids.tolist() for item in source.documents() if not isinstance(item, Rejected)]


def test_every_form_of_file(tmp_path, ids, tokenizer):
    end = tokenizer.eos_token_id
    flat = np.concatenate(ids)
    flat.astype("<u2").tofile(tmp_path / "a.bin")
    flat.astype("<u4").tofile(tmp_path / "b.bin")
    np.save(tmp_path / "flat.npy", flat.astype(np.int32))
    np.save(tmp_path / "rows.npy", np.array([row[:20] for row in ids], np.uint16))
    pq.write_table(pa.table({"input_ids": ids}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"tokens": row}) + "\n" for row in ids))
    assert read(Tokens(path=f"{tmp_path}/a.bin", document_end=end)) == ids
    assert read(Tokens(path=f"{tmp_path}/b.bin", document_end=end, dtype="uint32")) == ids
    assert read(Tokens(path=f"{tmp_path}/flat.npy", document_end=end)) == ids
    assert read(Tokens(path=f"{tmp_path}/rows.npy")) == [row[:20] for row in ids]
    assert read(Tokens(path=f"{tmp_path}/a.parquet")) == ids
    assert read(Tokens(path=f"{tmp_path}/a.jsonl", column="tokens")) == ids


@pytest.mark.parametrize("looked_at", [7, 1 << 20])
def test_flat_files_with_ends_before_documents_or_none_at_last(tmp_path, monkeypatch, looked_at):
    monkeypatch.setattr("distill.data.token_documents.LOOKED_AT", looked_at)
    np.array([0, 5, 6, 7, 0, 8, 0, 0, 9, 9], "<u2").tofile(tmp_path / "a.bin")
    assert read(Tokens(path=f"{tmp_path}/a.bin", document_end=0)) == [[5, 6, 7, 0], [8, 0], [9, 9]]


def test_tokens_train_and_validate_as_their_text_does(tmp_path, ids, tokenizer, text_of):
    """The same ids, the same rows and the same bytes as of the text that they were made of."""
    texts = [text_of(number) for number in range(60)]
    for name, numbers in (("train", range(50)), ("validation", range(50, 60))):
        rows = [{"text": texts[number], "input_ids": ids[number]} for number in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def corpus(kind):
        train, validation = (kind(path=f"{tmp_path}/{name}.jsonl") for name in ("train", "validation"))
        spec = DataSpec(train=train, validation=validation, sequence_length=8)
        return Corpus.open(spec, tokenizer, tmp_path / kind.__name__, 0, len(tokenizer))

    of_text, of_ids = corpus(Jsonl), corpus(Tokens)
    assert (of_text.train.tokens.ids() == of_ids.train.tokens.ids()).all()
    assert (of_text.train.tokens.bounds() == of_ids.train.tokens.bounds()).all()
    assert (of_text.validation.tokens.bytes_of_tokens() == of_ids.validation.tokens.bytes_of_tokens()).all()
    assert of_text.validation_bytes == of_ids.validation_bytes > 0
    assert "bytes each" in of_text.summary()
    assert "bytes each" not in of_ids.summary()  # nobody has read the text of the training


def test_an_end_is_put_behind_documents_that_have_none_and_only_if_asked(tmp_path, ids, tokenizer):
    pq.write_table(pa.table({"input_ids": [row[:-1] for row in ids]}), tmp_path / "a.parquet")
    end = tokenizer.eos_token_id
    for add_end in (False, True):
        made = opened(Tokens(path=f"{tmp_path}/a.parquet", add_end=add_end), tokenizer, tmp_path / str(add_end))
        tokens = made.train.tokens
        assert (tokens.ids() == end).sum() == add_end * tokens.num_documents


def test_ids_of_another_tokenizer_are_refused(tmp_path, ids, text_of):
    pq.write_table(pa.table({"input_ids": ids}), tmp_path / "a.parquet")
    others = ("".join(text_of(number).split()) for number in range(99))  # whose tokens are parts of words
    other = train_tokenizer(others, 500, tmp_path / "other")
    source = Tokens(path=f"{tmp_path}/a.parquet")
    with pytest.raises(InputError, match=r"becomes other ids.* by another tokenizer than data.tokenizer names"):
        next(iter(TokenEncoder(other).rows(list(source.documents()), with_bytes=False)))
    with pytest.raises(InputError, match=r"becomes other ids"):
        opened(source, other, tmp_path)
    made = TokenEncoder(other).rows(list(source.documents()), with_bytes=True)
    assert sum(isinstance(one, Rejected) for one in made) > 30
    small = train_tokenizer(["abc"], 260, tmp_path / "small")
    with pytest.raises(InputError, match=r"token id \d+, but the tokenizer has \d+ tokens; the ids were made"):
        opened(source, small, tmp_path)


def test_a_wrong_dtype_is_found(tmp_path, ids, tokenizer):
    np.concatenate(ids).astype("<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(InputError, match="every other id is 0, as where ids have more than 2 bytes; set a wider dtype"):
        opened(Tokens(path=f"{tmp_path}/a.bin", document_end=tokenizer.eos_token_id), tokenizer, tmp_path)
    np.concatenate(ids)[:1600].astype("<u2").tofile(tmp_path / "b.bin")
    wide = list(Tokens(path=f"{tmp_path}/b.bin", document_end=0, dtype="uint32").documents())
    with pytest.raises(InputError, match=r"b.bin:.* token id \d{6,}, but the tokenizer has \d+ tokens"):
        TokenEncoder(tokenizer).rows(wide, with_bytes=False)


def test_validation_leaves_out_and_counts_what_does_not_come_back(tmp_path, ids, tokenizer, text_of):
    (whole,) = TextEncoder(tokenizer).encode(["the quick"])
    apart = TextEncoder(tokenizer).encode(["t", "h", "e"])
    broken = [*(int(one[0]) for one in apart), *whole[-1:].tolist()]  # "the", a character at a time
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids[:40]))
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in [*ids[40:], broken]))
    train, validation = (Tokens(path=f"{tmp_path}/{name}.jsonl") for name in "tv")
    spec = DataSpec(train=train, validation=validation, sequence_length=8, max_dropped=0.1)
    made = Corpus.open(spec, tokenizer, tmp_path / "data", 0, len(tokenizer))
    assert made.validation.tokens.tally.dropped == {"ids of another tokenizer": 1}
    assert made.validation.tokens.num_bytes == sum(len(text_of(number).encode()) for number in range(40, 60))


@pytest.mark.parametrize(
    ("write", "more", "message"),
    [
        (lambda f: f("a.bin").write_bytes(b"abc"), {"document_end": 0}, "3 bytes are no whole number of ids of 2"),
        (lambda f: f("a.bin").write_bytes(b""), {"document_end": 0}, "0 bytes are no whole number"),
        (lambda f: f("a.bin").write_bytes(b"ab"), {}, "set document_end to the id with which a document ends"),
        (lambda f: f("a.bin").write_bytes(bytes(4000)), {"document_end": 7}, "1,000 ids from token 0 on without"),
        (lambda f: f("a.npy").write_bytes(b"\x93NUMPY"), {}, "not a whole .npy file"),
        (lambda f: f("a.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': ('<i8'"), {}, "not a whole .npy file"),
        (lambda f: np.save(f("a.npy"), np.array([{}])), {}, "not a whole .npy file"),
        (lambda f: np.save(f("a.npy"), np.ones((2, 2))), {}, "must hold whole numbers"),
        (lambda f: np.save(f("a.npy"), np.ones((0, 2), int)), {}, "must hold whole numbers"),
        (lambda f: f("a.txt").write_text("1 2 3"), {}, "no file in this folder ends in .bin, .npy, .parquet, .jsonl"),
    ],
)
def test_files_that_hold_no_ids_are_refused_in_one_line(tmp_path, monkeypatch, write, more, message):
    monkeypatch.setattr("distill.data.token_documents.LONGEST", 1000)
    write(tmp_path.joinpath)
    with pytest.raises(InputError) as error:
        read(Tokens(path=str(tmp_path), **more))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_that_hold_no_ids_are_named(tmp_path):
    rows = ['{"input_ids": [1, 2]}', "{", '{"x": 1}', '{"input_ids": "1 2"}', '{"input_ids": [1, -2]}', "[3]"]
    rows += ['{"input_ids": [1, true]}', '{"input_ids": [1.5]}', '{"input_ids": []}', '{"input_ids": [1e400]}']
    rows += ['{"input_ids": [99999999999999999999]}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    items = list(Tokens(path=str(tmp_path)).documents())
    assert [item.id.rpartition(":")[2] for item in items if isinstance(item, Rejected)] == [*"2345678", "10", "11"]
    assert {item.reason for item in items if isinstance(item, Rejected)} == {
        "not JSON",
        "no such column",
        "wrong type",
        "not an object",
    }


def test_a_recipe_cannot_train_a_tokenizer_on_ids(tmp_path):
    with pytest.raises(ValueError, match="ids of a tokenizer that exists"):
        DataSpec(train=Tokens(path="x"), sequence_length=8, tokenizer={"vocab_size": 300})
