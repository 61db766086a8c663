"""The sources: what they yield, in which order, and what they refuse."""

import gzip
import json
import subprocess
import sys
from typing import Annotated

import pytest
from pydantic import TypeAdapter

from distill.core.errors import InputError
from distill.data import SOURCES
from distill.data.base import Rejected, SourceSpec
from distill.data.hub import Hub
from distill.data.jsonl import Jsonl
from distill.data.python_docs import PythonDocs
from distill.data.spec import DataSpec
from distill.data.split import Split
from distill.data.text_files import TextFiles


def texts(source):
    return [document.text for document in source.documents()]


def test_specs_import_nothing_heavy():
    code = (
        "import sys, distill.data.spec, distill.data.split; "
        "print(sorted({'torch', 'numpy', 'tokenizers', 'transformers', 'datasets', 'rich'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_source_has_its_kind_and_documented_fields():
    assert {
        "python_docs",
        "text_files",
        "jsonl",
        "parquet",
        "csv",
        "saved",
        "hub",
        "tokens",
        "chat",
        "python_questions",
    } <= {*SOURCES}
    for kind, member in SOURCES.items():
        assert member.__module__ == f"distill.data.{kind}"
        assert all(field.description for name, field in member.model_fields.items() if name != "kind"), kind
    parsed = TypeAdapter(Annotated[SourceSpec, SOURCES]).validate_python("python_docs")
    assert isinstance(parsed, PythonDocs)


def test_python_docs_are_many_sorted_and_always_the_same():
    documents = list(PythonDocs().documents())
    names = [document.id for document in documents]
    assert len(documents) > 300
    assert sum(len(document.text) for document in documents) > 4_000_000
    assert len({document.text for document in documents}) == len(documents)
    assert {"module:json.decoder", "module:pathlib", "topic:lambda"} <= set(names)
    unwanted = ("site-packages", ".test", "encodings", "idlelib", "_sysconfigdata", "distutils")
    assert not [name for name in names if any(word in name for word in unwanted)]
    for part in ("topic:", "module:"):
        names_of_part = [name for name in names if name.startswith(part)]
        assert names_of_part == sorted(names_of_part)
    assert list(PythonDocs().documents()) == documents
    assert PythonDocs().fingerprint() == PythonDocs().fingerprint() != PythonDocs(parts="topics").fingerprint()


def test_python_docs_parts_and_size():
    assert all(document.id.startswith("topic:") for document in PythonDocs(parts="topics").documents())
    assert all(document.id.startswith("module:") for document in PythonDocs(parts="sources").documents())
    few = PythonDocs(max_bytes=300_000)
    assert 200_000 < few.num_bytes() <= 300_000
    with pytest.raises(InputError, match=r"max_bytes \(10\) is less than any document; raise it"):
        list(PythonDocs(max_bytes=10).documents())
    assert len({document.id[:8] for document in few.documents()}) > 5  # not one corner of the alphabet
    for held_out in (0.05, 0.2):  # a part is split as the whole is: not all of it is held out
        split = Split(DataSpec(train=PythonDocs(max_bytes=1_000_000), held_out=held_out, sequence_length=16))
        share = len(list(split.validation())) / len(list(split.data.train.documents()))
        assert 0.6 * held_out < share < 1.4 * held_out


def test_text_files_reads_folders_globs_files_and_gzip_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two\r\nlines\n", encoding="utf-8", newline="")
    (tmp_path / "sub" / "a.md").write_text("naïve", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("\n")
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("packed")
    assert texts(TextFiles(path=str(tmp_path))) == ["packed", "two\r\nlines\n", "naïve"]
    assert texts(TextFiles(path=f"{tmp_path}/**/*.md")) == ["naïve"]
    assert texts(TextFiles(path=[f"{tmp_path}/b.txt", f"{tmp_path}/*.txt"])) == ["two\r\nlines\n"]


def test_text_files_fingerprint_follows_content_not_time(tmp_path):
    import os

    file = tmp_path / "a.txt"
    file.write_text("one")
    source = TextFiles(path=str(file))
    before = source.fingerprint()
    os.utime(file, (1, 1))
    assert source.fingerprint() == before
    file.write_text("two")
    assert source.fingerprint() != before


def test_the_same_text_elsewhere_is_the_same_source(tmp_path):
    import datasets

    def place(name, *, other=""):
        folder = tmp_path / name
        (folder / "notes").mkdir(parents=True)
        for number in range(3):
            (folder / "notes" / f"{number}{name}.txt").write_text(f"note {number}{other}")
        rows = [{"text": f"row {i}{other}", "title": f"title {i}"} for i in range(5)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with gzip.GzipFile(folder / "rows.jsonl.gz", "w", mtime=0) as stream:
            stream.write((folder / "rows.jsonl").read_bytes())
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{other}"}]
        (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        (folder / "set").mkdir()
        datasets.Dataset.from_list(rows).to_parquet(folder / "set" / "train.parquet")
        return [
            TextFiles(path=str(folder / "notes")),
            Jsonl(path=str(folder / "rows.jsonl")),
            Jsonl(path=str(folder / "rows.jsonl"), text="title"),
            Jsonl(path=[str(folder / "rows.jsonl"), str(folder / "rows.jsonl.gz")]),
            Hub(path=str(folder / "set")),
            Hub(path=str(folder / "set"), text="title"),
            SOURCES["chat"](path=str(folder / "chat.jsonl")),
        ]

    here, there, changed = place("here"), place("there"), place("changed", other="!")
    identities = [source.identity() for source in here]
    assert [source.identity() for source in there] == identities
    assert len(set(identities)) == len(identities)  # another column, another way to read, other bytes
    assert not {source.identity() for source in changed} & {*identities}
    assert Hub(path="org/one").identity() != Hub(path="org/two").identity()
    assert Hub(path="org/one").identity() != Hub(path="org/one", revision="abc").identity()


def test_sources_within_a_source_are_identified_alike():
    class Several(SourceSpec):
        kind: str = "several"
        sources: dict[str, Jsonl]

        def fingerprint(self):
            return "the same bytes"

    def several(path, **more):
        return Several(sources={"one": Jsonl(path=path, **more)}).identity()

    assert several("a.jsonl") == several("b.jsonl") != several("b.jsonl", text="title")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no file in this folder ends in"),
        (lambda path: path.write_bytes(b"abc\xff"), "not UTF-8 text (byte 3 is 0xff)"),
    ],
)
def test_text_files_refuses_what_it_cannot_read(tmp_path, make, message):
    path = tmp_path / "x.txt"
    make(path)
    with pytest.raises(InputError) as error:
        list(TextFiles(path=str(path)).documents())
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cut_gzip_file_is_a_mistake_of_one_line(tmp_path):
    whole = gzip.compress(b"text " * 1000)
    (tmp_path / "x.txt.gz").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="not a whole gzip file"):
        list(TextFiles(path=f"{tmp_path}/x.txt.gz").documents())


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_keeps_unicode_line_separators(tmp_path, packed):
    written = ["a\u2028b\u2029c\x85d", "e\r\nf\n\ng\x0b", "plain"]
    data = "\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in written).encode()
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    source = Jsonl(path=str(tmp_path), text="body")
    assert texts(source) == written
    assert [document.id for document in source.documents()] == [f"{path.as_posix()}:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "a"', "not a row of JSON"),
        ('["a"]', "a row must be a JSON object (got list)"),
        ('{"body": "a", "id": 1}', "no column 'text' (it has 'body', 'id')"),
        ('{"text": 3}', "must hold a string (got int)"),
        ('{"text": "\\ud800"}', "half"),
    ],
)
def test_jsonl_names_the_line_of_a_bad_row(tmp_path, row, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n\n' + row + "\n")
    _, rejected = Jsonl(path=str(path)).documents()
    assert isinstance(rejected, Rejected)
    assert rejected.id == f"{path.as_posix()}:3"
    assert message in rejected.detail
    assert "\n" not in rejected.detail


@pytest.fixture
def parquet(tmp_path):
    import datasets

    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["one", "", "drei ß"], "n": [1, 2, 3]}).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_reads_a_local_folder(parquet, streaming, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = Hub(path=str(parquet), streaming=streaming)
    assert texts(source) == texts(source) == ["one", "drei ß"]
    assert source.is_stream() == streaming
    with pytest.raises(InputError, match=r"no column 'body' \(it has 'text', 'n'\)"):
        texts(Hub(path=str(parquet), text="body", streaming=streaming))
    assert {item.detail for item in Hub(path=str(parquet), text="n", streaming=streaming).documents()} == {
        "column 'n' must hold a string (got int)"
    }


def test_hub_says_in_one_line_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be loaded") as error:
        texts(Hub(path=str(tmp_path / "none")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("deep", ['{"text": "a", "x": ' + "[" * 100_000, "[" * 100_000, '{"x": ' * 100_000])
def test_a_row_that_is_nested_too_deep_is_one_line(tmp_path, deep):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + deep + "\n")
    _, rejected = Jsonl(path=f"{tmp_path}/x.jsonl").documents()
    assert rejected.id.endswith("x.jsonl:2")
    assert rejected.detail.startswith("not a row of JSON (maximum recursion depth exceeded")
    assert "\n" not in rejected.detail


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl", "x.jsonl.gz"])
def test_a_document_larger_than_any_text_is_not_read_to_its_end(tmp_path, monkeypatch, name):
    """A packed file of a megabyte may stand for a gigabyte of spaces."""
    monkeypatch.setattr("distill.data.files.LARGEST", 100)
    kind = Jsonl if "jsonl" in name else TextFiles

    def write(num_characters):
        text = "a" * num_characters
        row = json.dumps({"text": text}) + "\n" if kind is Jsonl else text
        data = (row * 2 if kind is Jsonl else row).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        return texts(kind(path=f"{tmp_path}/{name}"))

    assert write(80) == ["a" * 80] * (2 if kind is Jsonl else 1)
    with pytest.raises(InputError, match=r"x\..*: more than 100 bytes in one document; is it text\?"):
        write(101)
