"""Where conversations are read from: each row is called by its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import InputError
from distill.data.base import Conversation, Rejected
from distill.data.chat import Chat
from distill.data.python_questions import PythonQuestions

ROWS: list[dict[str, Any]] = [{"prompt": f"{number}?", "response": f"{number}."} for number in range(3)]
CALL = {"name": "f", "arguments": {"a": 1}}


def read(**place: Any) -> list[Conversation | Rejected]:
    return list(Chat(**place).documents())


def texts(found: list[Conversation | Rejected]) -> list[str]:
    return [one.text for one in found]


def test_rows_of_files_are_called_by_file_and_line(tmp_path: Path) -> None:
    import datasets

    body = "\n".join(map(json.dumps, ROWS))
    (tmp_path / "a.jsonl").write_text("\n" + body)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(body.encode()))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.json").write_text(json.dumps(ROWS))  # in a folder it is left alone: many hold a config
    found = read(path=str(tmp_path))
    assert texts(found) == ["0?\n\n0.", "1?\n\n1.", "2?\n\n2."] * 3
    names = [one.id.removeprefix(tmp_path.as_posix() + "/") for one in found]
    assert names == [*(f"{file}:{line}" for file, start in (("a.jsonl", 2), ("b.jsonl.gz", 1)) for line in
                       range(start, start + 3)), *(f"c.parquet:row {row}" for row in (1, 2, 3))]  # fmt: skip
    assert [one.id.rpartition("/")[2] for one in read(path=[str(tmp_path / "d.json")])] == [
        f"d.json:row {row}" for row in (1, 2, 3)
    ]


def test_a_data_set_of_the_hub_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "set" / "train.parquet")
    found = read(hub=str(tmp_path / "set"))
    assert texts(found) == ["0?\n\n0.", "1?\n\n1.", "2?\n\n2."]
    assert found[1].id == f"{tmp_path / 'set'}:1"
    with pytest.raises(InputError, match=r"nowhere \(train\): this data set cannot be loaded"):
        read(hub=str(tmp_path / "nowhere"))


def test_a_row_of_parquet_has_no_keys_of_other_rows(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in (CALL, CALL | {"arguments": {"b": "x"}})
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    found = read(path=str(tmp_path))
    calls = [
        one.messages[1]["tool_calls"][0]["function"]["arguments"] for one in found if isinstance(one, Conversation)
    ]
    assert calls == [{"a": 1}, {"b": "x"}]


def test_a_row_that_cannot_be_read_says_why_and_the_others_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        b'{"prompt": "a", "response": "b"}\n{"prompt"\n[1]\n{"prompt": "\xff"}\n{"prompt": "c", "response": "d"}'
    )
    found = read(path=str(file))
    assert [one.reason if isinstance(one, Rejected) else one.text for one in found] == [
        "a\n\nb", "not JSON", "not an object", "not JSON", "c\n\nd",
    ]  # fmt: skip
    assert [one.id for one in found] == [f"{file.as_posix()}:{line}" for line in range(1, 6)]


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": []}')
    (tmp_path / "b.json").write_text("[1,")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    for name, why in {
        "a.json": "must hold a list of rows .it holds a dict.; name it .jsonl",
        "b.json": "must hold a list of rows .not a row of JSON",
        "c.parquet": "not a whole parquet file",
        "d.jsonl": "no such file",
    }.items():
        with pytest.raises(InputError, match=why):
            read(path=str(tmp_path / name))


def test_a_place_and_a_form_are_named_once() -> None:
    for keys, why in [
        ({}, "name one place"),
        ({"path": "a", "hub": "b"}, "name one place"),
        ({"path": "a", "split": "test"}, "name, split and revision belong to hub"),
        ({"path": "a", "prompt": "q"}, "prompt and response are named together"),
        ({"path": "a", "prompt": "q", "response": "a", "messages": "m"}, "name one of the two forms"),
    ]:
        with pytest.raises(ValueError, match=why):
            Chat.model_validate(keys)


def test_the_fingerprint_is_of_the_bytes_and_the_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(ROWS[0]))
    before = Chat(path=str(file)).fingerprint()
    assert Chat(path=str(file)).fingerprint() == before
    assert Chat(path=str(file), prompt="response", response="prompt").fingerprint() != before
    file.write_text(json.dumps(ROWS[1]))
    assert Chat(path=str(file)).fingerprint() != before


def test_questions_about_python_are_many_and_always_the_same() -> None:
    found = list(PythonQuestions().documents())
    assert len(found) > 1000
    assert len({one.text for one in found}) == len(found)
    by_name = {one.id: one for one in found}
    asked = by_name["python:json.dumps"]
    assert asked.messages[0]["content"] == "What does json.dumps do?"
    assert asked.messages[1]["content"].startswith("Serialize ``obj`` to a JSON formatted")
    assert asked.messages[3]["content"].startswith("dumps(obj, *, skipkeys=False")
    assert asked.learned == (False, True, False, True)
    assert list(PythonQuestions().documents()) == found
