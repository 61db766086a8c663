"""Sources with columns: parquet, CSV, saved data sets and compressed JSON Lines, whole and damaged."""

import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.core.errors import InputError
from distill.data.base import Rejected
from distill.data.chat import Chat
from distill.data.corpus import Corpus
from distill.data.csv import Csv
from distill.data.hub import Hub
from distill.data.jsonl import Jsonl
from distill.data.parquet import Parquet
from distill.data.saved import Saved
from distill.data.spec import DataSpec
from distill.data.split import Split
from distill.data.stream import Position, Stream
from distill.data.text_files import TextFiles

ROWS = [{"title": f"t{i}", "body": f"body {i} ß", "tags": ["x"] * (i % 2), "n": i} for i in range(5)]
TEMPLATE = "{{ title }}: {{ body }}{% if tags %} ({{ tags | join(', ') }}){% endif %}"
TEXTS = [f"t{i}: body {i} ß" + " (x)" * (i % 2) for i in range(5)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def texts(source):
    return [item.text for item in source.documents() if not isinstance(item, Rejected)]


def rejected(source):
    return [(item.id.rpartition("/")[2], item.reason) for item in source.documents() if isinstance(item, Rejected)]


def refusal(source):
    with pytest.raises(InputError) as error:
        list(source.documents())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_jsonl_by_a_template_plain_and_compressed(tmp_path, name):
    packed = {"gz": gzip.compress, "zst": zstd}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(packed(JSONL))
    source = Jsonl(path=str(tmp_path), text=TEMPLATE)
    assert texts(source) == TEXTS
    assert (source.num_bytes() is None) == name.endswith((".gz", ".zst"))
    assert source.identity() != Jsonl(path=str(tmp_path), text="title").identity()


def test_zstd_of_text_files_of_several_frames_and_of_conversations(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"one ") + zstd("dreißig".encode()))
    assert texts(TextFiles(path=str(tmp_path))) == ["one dreißig"]
    row = json.dumps({"prompt": "a?", "response": "b"}) + "\n"
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(row.encode() * 3))
    assert len(list(Chat(path=f"{tmp_path}/c.jsonl.zst").documents())) == 3


@pytest.mark.parametrize("data", [zstd(JSONL * 50)[:-9], b"not packed at all", zstd(JSONL) + b"behind"])
def test_damaged_zstd_is_a_mistake_of_one_line(tmp_path, data):
    (tmp_path / "x.jsonl.zst").write_bytes(data)
    assert "x.jsonl.zst: not a whole zstd file" in refusal(Jsonl(path=str(tmp_path), text="body"))


@pytest.mark.parametrize(("log", "is_read"), [(20, True), (27, True), (28, False), (31, False)])
def test_zstd_that_needs_more_memory_than_any_is_refused(tmp_path, log, is_read):
    magic, descriptor, window, block = b"\x28\xb5\x2f\xfd", b"\x00", bytes([(log - 10) << 3]), b"\x09\x00\x00a"
    (tmp_path / "x.txt.zst").write_bytes(magic + descriptor + window + block)
    source = TextFiles(path=str(tmp_path))
    if is_read:
        assert texts(source) == ["a"]
    else:
        assert "x.txt.zst: needs more than 128 MiB of memory to decompress; pack it again without --long" in refusal(
            source
        )


def test_a_small_zstd_file_that_stands_for_a_large_one_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.data.files.LARGEST", 1_000_000)
    (tmp_path / "x.jsonl.zst").write_bytes(zstd(b" " * 50_000_000))
    assert "more than 1,000,000 bytes in one document" in refusal(Jsonl(path=str(tmp_path)))


# ----------------------------------------------------------------------------------------------------------- parquet


@pytest.fixture
def parquet(tmp_path):
    """A folder with a parquet file of three row groups."""
    folder = tmp_path / "rows"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=2)
    return folder


def test_parquet(parquet):
    source = Parquet(path=str(parquet), text=TEMPLATE)
    assert texts(source) == texts(source) == TEXTS
    assert [item.id for item in source.documents()][-1] == f"{parquet.as_posix()}/a.parquet:row 5"
    assert texts(Parquet(path=str(parquet), text="body")) == [row["body"] for row in ROWS]
    assert source.num_bytes() == (parquet / "a.parquet").stat().st_size


def test_parquet_without_the_column_is_refused_before_its_rows_are_read(parquet):
    for text in ("text", "{{ text }}"):
        line = refusal(Parquet(path=str(parquet), text=text))
        assert "a.parquet: no column 'text' (it has 'title', 'body', 'tags', 'n'); set text: COLUMN" in line
    assert rejected(Parquet(path=str(parquet), text="n")) == [(f"a.parquet:row {i}", "wrong type") for i in range(1, 6)]


def test_damaged_parquet_is_a_mistake_of_one_line(parquet):
    file = parquet / "a.parquet"
    whole = file.read_bytes()
    for damaged in (
        whole[:-40],
        whole[:50] + bytes(80) + whole[130:],
        b"",
        b"PAR1" * 5,
        whole[:-8] + b"\xff\xff\xff\x7fPAR1",
    ):
        file.write_bytes(damaged)
        assert "a.parquet: not a whole parquet file" in refusal(Parquet(path=str(parquet), text="body"))
    (parquet / "a.parquet.gz").write_bytes(gzip.compress(whole))
    assert "compressed inside" in refusal(Parquet(path=f"{parquet}/a.parquet.gz", text="body"))


def test_parquet_does_not_repeat_in_memory_what_is_stored_once(tmp_path):
    """100 GB of text in a file of 25 kB: rows are made one at a time."""
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["z" * 1_000_000]))
    pq.write_table(pa.table({"text": once}), tmp_path / "x.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    documents = Parquet(path=str(tmp_path)).documents()
    assert {len(next(documents).text) for _ in range(300)} == {1_000_000}
    assert pa.total_allocated_bytes() - before < 20_000_000


def test_parquet_with_bytes_that_are_no_text_loses_that_row_alone(tmp_path):
    column = pa.array([b"fine", b"\xff\xfe", b"also"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    source = Parquet(path=str(tmp_path))
    assert (texts(source), rejected(source)) == (["fine", "also"], [("x.parquet:row 2", "not text")])


# --------------------------------------------------------------------------------------------------------------- csv


def test_csv_with_quotes_line_breaks_and_a_mark_at_its_beginning(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufefftitle,body\r\n"one\ntwo","a, ""b"""\r\n\r\nlast,ß\r\n'.encode())
    source = Csv(path=str(tmp_path), text="{{ title }}|{{ body }}")
    assert texts(source) == ['one\ntwo|a, "b"', "last|ß"]
    assert [item.id.rpartition(":")[2] for item in source.documents()] == ["2", "5"]


def test_tsv_other_delimiters_and_files_without_a_header(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"id\ttext\n1\tone, two\n"))
    assert texts(Csv(path=str(tmp_path))) == ["one, two"]
    (tmp_path / "b.csv").write_text("1;one, two\n2;three\n")
    assert texts(Csv(path=f"{tmp_path}/b.csv", delimiter=";", columns=["id", "text"])) == ["one, two", "three"]


def test_csv_names_the_line_of_each_bad_row_and_reads_the_others(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'title,text\na,1\nonly\n"a\nb",2\nx,y,z\n"q"z,3\nc,\xff\nd,4\n')
    source = Csv(path=str(tmp_path))
    assert texts(source) == ["1", "2", "4"]
    assert rejected(source) == [
        ("a.csv:3", "ragged row"),
        ("a.csv:6", "ragged row"),
        ("a.csv:7", "not CSV"),
        ("a.csv:8", "not text"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.csv: has no header"),
        (b'title,text\na,b\n"c,d\ne,f\n', "a.csv:3: a quote in this row is not closed"),
        (b"title,body\na,b\n", "a.csv:1: no column 'text' (it has 'title', 'body'); set text: COLUMN"),
        (b"text,text\na,b\n", "a.csv:1: two columns are called 'text'"),
        (b"title,text\ra,b\r", "a.csv:1: the header is no row of CSV"),
        (b'text\n"' + b"x" * 5000, "a.csv:2: a quote in this row is not closed (within 1,000 characters"),
    ],
)
def test_csv_that_cannot_be_read_is_refused(tmp_path, monkeypatch, data, message):
    monkeypatch.setattr("distill.data.csv.LARGEST_FIELD", 1000)
    (tmp_path / "a.csv").write_bytes(data)
    assert message in refusal(Csv(path=str(tmp_path)))


# ------------------------------------------------------------------------------------------------------------- saved


@pytest.fixture
def saved(tmp_path):
    """A data set and one of two splits, as the library datasets writes them."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows.select([3, 1])}).save_to_disk(tmp_path / "two")
    return tmp_path


def test_saved(saved):
    assert texts(Saved(path=f"{saved}/one", text=TEMPLATE)) == TEXTS
    test = Saved(path=f"{saved}/two", split="test", text=TEMPLATE)
    assert texts(test) == [TEXTS[3], TEXTS[1]]
    assert test.fingerprint() != Saved(path=f"{saved}/two", split="train", text=TEMPLATE).fingerprint()
    assert test.num_bytes() > 0
    one = Saved(path=f"{saved}/one", text=TEMPLATE)
    before = one.fingerprint(), one.num_bytes()
    (saved / "one" / "cache-0123456789abcdef.arrow").write_bytes(b"what Dataset.map leaves")
    assert (one.fingerprint(), one.num_bytes()) == before


def test_a_saved_data_set_reads_no_file_outside_of_its_folder(saved):
    state = json.loads((saved / "one" / "state.json").read_text())
    for listed, message in (([{"filename": "../two/x.arrow"}], "which is no file in it"), ([], "names no data files")):
        (saved / "one" / "state.json").write_text(json.dumps(state | {"_data_files": listed}))
        with pytest.raises(InputError, match=message):
            Saved(path=f"{saved}/one", text=TEMPLATE).fingerprint()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "two"}, "has the splits train, test; set split to one"),
        ({"path": "two", "split": "../one"}, "set split to one (got '../one')"),
        ({"path": "one", "split": "test"}, "has no splits, so split: test has no effect"),
        ({"path": "one"}, "no column 'text' (it has 'title', 'body', 'tags', 'n')"),
        ({"path": "none"}, "no such folder"),
        ({"path": "."}, "was not written by save_to_disk"),
    ],
)
def test_saved_refuses_in_one_line(saved, source, message):
    assert message in refusal(Saved(**{**source, "path": f"{saved}/{source['path']}"}))


def test_a_damaged_saved_data_set_is_a_mistake_of_one_line(saved):
    for file in sorted((saved / "one").glob("*.arrow")):
        whole = file.read_bytes()
        for damaged in (whole[:-300], bytes(len(whole)), whole[: len(whole) // 2]):
            file.write_bytes(damaged)
            assert "this data set cannot be read" in refusal(Saved(path=f"{saved}/one", text="body"))
        file.write_bytes(whole)


def test_hub_names_the_source_that_reads_what_it_does_not(saved, parquet):
    assert "use kind: saved" in refusal(Hub(path=f"{saved}/one", text="body"))
    assert "is a file and no data set; use kind: parquet" in refusal(Hub(path=f"{parquet}/a.parquet"))
    assert "no such file; correct the path, and use kind: parquet" in refusal(Hub(path=f"{parquet}/nothere.parquet"))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_by_a_template(parquet, streaming, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert texts(Hub(path=str(parquet), text=TEMPLATE, streaming=streaming)) == TEXTS
    assert len(rejected(Hub(path=str(parquet), text="n", streaming=streaming))) == 5


# ----------------------------------------------------------------------------------------------- what a recipe allows


def corpus(source, tokenizer, folder, **more):
    spec = DataSpec(train=source, sequence_length=8, held_out=0.2, validation_tokens=100, **more)
    return Corpus.open(spec, tokenizer, folder / "data", 0, len(tokenizer))


def test_rows_that_cannot_be_used_are_counted_and_stop_the_run_above_the_share_that_is_allowed(
    tmp_path, tokenizer, text_of
):
    lines = [json.dumps({"text": text_of(number)}) for number in range(60)]
    lines[7], lines[20], lines[21] = "{", '{"body": "a"}', '{"text": 3}'
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    source = Jsonl(path=f"{tmp_path}/x.jsonl")
    with pytest.raises(InputError) as error:
        corpus(source, tokenizer, tmp_path)
    line = str(error.value)
    assert "data.train: 3 of " in line
    assert "data.max_dropped allows 1.0%" in line
    assert f"1 not JSON (first {tmp_path}/x.jsonl:8: not a row of JSON" in line
    assert "1 no such column (first" in line
    made = corpus(source, tokenizer, tmp_path, max_dropped=0.1)
    assert made.train.tokens.tally.dropped == {"not JSON": 1, "no such column": 1, "wrong type": 1}
    assert any("left out 3 of " in line for line in made.summary().splitlines())


def test_a_stream_counts_what_it_leaves_out_too(tmp_path, tokenizer, text_of, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"a": text_of(number), "b": None if number == 50 else "b"} for number in range(60)]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "a.parquet")
    source = Hub(path=f"{tmp_path}/set", text="{{ a }} {{ b }}", streaming=True)
    made = corpus(source, tokenizer, tmp_path, max_dropped=0.05)
    assert isinstance(made.train, Stream)
    of_a_pass = itertools.takewhile(lambda at: at.number == 0, (at for _, at in made.train.read(Position())))
    num_blocks = max(at.num_tokens for at in of_a_pass) // 8
    made.train.first(num_blocks + 2)
    assert "a.parquet" not in (said := capsys.readouterr().err)
    assert ":50 and its like: column 'b' holds none" in said
    strict = corpus(source, tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"1 of \d+ rows cannot be used .* 1 a null"):
        strict.train.first(num_blocks + 2)


def test_max_dropped_has_no_effect_on_text_files(tmp_path):
    with pytest.raises(ValueError, match="max_dropped has no effect on text_files, which has no rows"):
        DataSpec(train=TextFiles(path="x"), sequence_length=8, max_dropped=0.5)
    assert DataSpec(train=Csv(path="x"), sequence_length=8, max_dropped=0.5).drops_rows


def test_a_split_source_reports_no_row_twice(tmp_path, text_of):
    lines = [json.dumps({"text": text_of(number)}) for number in range(30)] + ["{"]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    split = Split(DataSpec(train=Jsonl(path=f"{tmp_path}/x.jsonl"), sequence_length=8, held_out=0.2))
    both = [*split.training(), *split.validation()]
    assert (len(both), sum(isinstance(item, Rejected) for item in both)) == (31, 1)
