"""Files that somebody else has put there are read when they are files, and refused in one line when they are not."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from distill.core.artifact import fingerprint
from distill.core.errors import InputError
from distill.core.model_config import check_config
from distill.core.model_folder import check_folder, content_files
from distill.core.outside import LARGEST_TEXT, is_folder, opened, read, read_json
from distill.data.files import find
from distill.models.load import load_config
from distill.pretrained import tokenizer_from


def make(kind: str, file: Path) -> str:
    """Put something that is no file there; returns what it is called."""
    match kind:
        case "pipe":
            os.mkfifo(file)
            return "is a named pipe, expected a regular file"
        case "zeros":
            file.symlink_to("/dev/zero")
            return "is a device, expected a regular file"
        case "dangling":
            file.symlink_to("gone")
            return "no such file, or a link that leads nowhere"
        case "loop":
            file.symlink_to(file.name)
            return "is a link that leads in a circle"
        case "socket":
            here = Path.cwd()
            os.chdir(file.parent)  # a socket's path may have 107 bytes
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(file.name)
            os.chdir(here)
            return "is a socket, expected a regular file"
    file.mkdir()
    return "is a folder, expected a regular file"


KINDS = ("pipe", "zeros", "dangling", "loop", "socket")


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
def test_what_is_no_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    said = make(kind, tmp_path / "x.json")
    for reader in (read, read_json):
        with pytest.raises(InputError, match=f"^{tmp_path / 'x.json'}: {said}"):
            reader(tmp_path / "x.json")
    with pytest.raises(InputError, match=said), opened(tmp_path / "x.json"):
        raise AssertionError("opened")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vocab.json", "model-00001-of-00002.safetensors"])
def test_a_folder_with_something_else_in_it_is_refused_by_every_reader(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    said = make(kind, tmp_path / name)
    for reader in (content_files, check_folder, load_config, fingerprint, tokenizer_from):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: {said}"):
            reader(tmp_path if reader in (content_files, check_folder) else str(tmp_path))  # type: ignore[operator]


def test_folders_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = fingerprint(str(tmp_path))
    (tmp_path / "old.json").mkdir()
    make("dangling", tmp_path / ".#config.json")
    make("pipe", tmp_path / ".x.json")
    make("pipe", tmp_path / "notes.md")
    assert content_files(tmp_path) == [tmp_path / "config.json"]
    assert fingerprint(str(tmp_path)) == before
    assert load_config(str(tmp_path)).model_type == "llama"


def test_texts_have_a_largest_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = tmp_path / "tokenizer.json"
    with tokenizer.open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)  # takes no room
    with pytest.raises(InputError, match=r"tokenizer\.json: has more than 67,108,864 bytes"):
        read_json(tokenizer)
    for reader in (tokenizer_from, fingerprint, load_config):
        with pytest.raises(InputError, match=r"tokenizer\.json: has 64 MiB, expected at most 64, which is twice what"):
            reader(str(tmp_path))
    tokenizer.rename(tmp_path / "rows.json")
    assert content_files(tmp_path) == [tmp_path / "config.json"]  # a data set beside a model is none of its files


@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop", "socket"])
def test_a_text_that_is_no_file_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    said = make(kind, tmp_path / "text.jsonl")
    with pytest.raises(InputError, match=f"text.jsonl: {said}"):
        find(str(tmp_path / "text.jsonl"), [".jsonl"])
    with pytest.raises(InputError, match=r"no file in this folder ends in \.jsonl"):
        find(str(tmp_path), [".jsonl"])


@pytest.mark.parametrize("path", ["", "x" * 5000, "a\0b", "~nobody-of-this-name/x", "/dev/null"])
def test_what_no_folder_can_be_is_none(path: str) -> None:
    assert not is_folder(path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_hidden_layers", 10**9, "a whole number up to 4,096"),
        ("n_layer", "two", "a whole number up to 4,096"),
        ("hidden_size", 10**9, "a whole number up to 16,777,216"),
        ("vocab_size", True, "a whole number up to 16,777,216"),
        ("num_attention_heads", [4, "x"], "a whole number up to"),
        ("max_position_embeddings", "many", "a whole number up to"),
        ("architectures", 5, "a list of strings"),
        ("architectures", [None], "a list of strings"),
        ("model_type", [1], "a string"),
        ("eos_token_id", {"a": 1}, "a token id, or a list of them"),
        ("quantization_config", "int4", "an object"),
    ],
)
def test_a_config_holds_what_a_model_can_have(key: str, value: object, expected: str) -> None:
    for config in ({key: value}, {"text_config": {key: value}}):
        with pytest.raises(InputError, match=f"^here: {key} is .*, expected {expected}"):
            check_config(config, "here")
    check_config({key: None}, "here")


def test_a_config_may_give_each_layer_its_own_size() -> None:
    check_config({"intermediate_size": [64, 32], "num_key_value_heads": [2, 1], "eos_token_id": [1, 2]}, "here")
