"""Odd model folders: whatever is read of them is fine or refused in one line, and nothing hangs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill.core.artifact import LINEAGE, Artifact, fingerprint
from distill.core.errors import DistillError
from distill.data.tokenizer import load_tokenizer
from distill.exporters.huggingface import HuggingFace
from distill.exporters.stored_weights import bits_of, stored_weights
from distill.forecast import describe
from distill.models.layouts import layout_for
from distill.models.load import load_config, load_empty, load_model
from distill.models.size import measure_size
from distill.models.weight_files import Shards
from distill.pretrained import generation_config_from
from distill.recipe import Recipe

Dice = random.Random
FOLDERS = 90
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 3, 1.5, 1e300, float("nan"), 10**9, 10**40, "", "x", "../x", "/dev/zero", [], {}, [None], [[1]],
    {"a": 1}, "x" * 5000, [0] * 3, ["x"], {"0": {}}, 2**31, 2**63,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what is done


def _nodes(data: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value inside of JSON; of long lists and objects the first fifty."""
    items = list(data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ())[:50]
    for key, value in items:
        yield data, key
        yield from _nodes(value)


def _changed(text: str, dice: Dice) -> str:
    """JSON with one or two of its values replaced, removed, repeated or deeply wrapped."""
    data = json.loads(text)
    for _ in range(dice.choice((1, 1, 2))):
        holder, key = dice.choice(list(_nodes(data)) or [({}, "x")])
        match dice.choice(("replace", "replace", "replace", "remove", "add", "nest")):
            case "remove":
                holder.pop(key)
            case "add" if isinstance(holder, dict):
                holder[dice.choice(("auto_map", "text_config", "quantization_config", "vocab_file", "dtype", "x"))] = (
                    dice.choice(WRONG)
                )
            case "nest":
                holder[key] = [holder[key]] * dice.choice((1, 2, 1000))
            case _:
                holder[key] = dice.choice(WRONG)
    return json.dumps(data)


def change_json(folder: Path, dice: Dice) -> str:
    file = dice.choice([folder / "config.json"] * 3 + sorted(folder.glob("*.json")))
    try:
        file.write_text(_changed(file.read_text(encoding="utf-8"), dice))
    except (ValueError, OSError):
        file.unlink()
    return f"{file.name} changed"


def change_header(folder: Path, dice: Dice) -> str:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = _changed(data[8 : 8 + length].decode(), dice).encode()
    file.write_bytes(struct.pack("<Q", dice.choice((len(header), len(header), 2**40))) + header + data[8 + length :])
    return "header changed"


def cut(folder: Path, dice: Dice) -> str:
    file = dice.choice([file for file in sorted(folder.iterdir()) if file.is_file()])
    data = file.read_bytes()
    at = dice.randrange(len(data))
    noise = dice.randbytes(dice.choice((0, 1, 50)))
    file.write_bytes(data[:at] + noise + (data[at + len(noise) :] if dice.random() < 0.5 else b""))
    return f"{file.name} cut or overwritten"


def put_special(folder: Path, dice: Dice) -> str:
    """Something that is no file, under a name that is read, or under one that only looks like it."""
    others = ("old.json", ".#config.json", "x.safetensors", "added_tokens.json", "model.safetensors.index.json")
    others += ("chat_template.jinja", "merges.txt", "tokenizer.model", LINEAGE, "adapter_config.json")
    file = folder / dice.choice((*sorted(file.name for file in folder.iterdir()), *others))
    if file.is_dir():
        return "nothing"
    file.unlink(missing_ok=True)
    kind = dice.choice(("pipe", "zeros", "null", "dangling", "loop", "folder", "socket", "huge", "empty"))
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "zeros":
            file.symlink_to("/dev/zero")
        case "null":
            file.symlink_to("/dev/null")
        case "dangling":
            file.symlink_to("user@host.1234")
        case "loop":
            file.symlink_to(file.name)
        case "folder":
            file.mkdir()
        case "socket":
            here = Path.cwd()
            os.chdir(folder)  # a socket's path may have 107 bytes
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(file.name)
            os.chdir(here)
        case "huge":
            file.touch()
            os.truncate(file, 1 << 40)  # which takes no room
        case "empty":
            file.touch()
    return f"{file.name} is {kind}"


CHANGES: tuple[Callable[[Path, Dice], str], ...] = (change_json, change_header, cut, put_special)


# --------------------------------------------------------------------------------------------------------- what reads


def planned(folder: Path) -> str:
    stages = {"distill": {"student": "teacher", "num_steps": 1}, "quantize": {"student": "distill", "num_steps": 0}}
    stages |= {"prune": {"model": "teacher", "keep": {"intermediate_size": 16}}}
    data = {"train": {"kind": "jsonl", "path": str(folder.parent / "text.jsonl")}, "sequence_length": 16}
    return describe(Recipe.from_text(json.dumps({"name": "x", "teacher": str(folder), "data": data, "stages": stages})))


def exported(folder: Path) -> None:
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    HuggingFace().export(folder, out, title="x")


def by_parameter(folder: Path) -> None:
    layout_for(load_config(str(folder)).model_type)
    shards = Shards(str(folder))
    for name, _ in shards.model.named_parameters():
        shards.read(name)


READERS: dict[str, Callable[[Path], Any]] = {
    "fingerprint": lambda folder: fingerprint(str(folder)),
    "lineage": lambda folder: Artifact("x", str(folder)).lineage(),
    "generation": lambda folder: generation_config_from(str(folder)),
    "tokenizer": lambda folder: load_tokenizer(folder)("row of the text"),
    "check": planned,
    "empty": lambda folder: load_empty(str(folder)),
    "model": lambda folder: load_model(str(folder)),
    "size": measure_size,
    "shards": by_parameter,
    "codes": lambda folder: (bits_of(folder), list(stored_weights(folder))),
    "export": exported,
}


@contextmanager
def _in_time(seconds: int, what: str) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"{what}: no end in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_all(folder: Path, what: str) -> list[str]:
    """The lines with which readers refuse a folder."""
    refusals = []
    for name, reader in READERS.items():
        try:
            with _in_time(120, f"{what}: {name}"):
                reader(folder)
        except DistillError as error:
            refusals.append(f"{name}: {error}")
        except AssertionError:
            raise
        except BaseException as error:
            raise AssertionError(f"{what}: {name} ends in {type(error).__name__}: {error}") from error
    for line in refusals:
        assert "\n" not in line or line.startswith("check: "), (what, line)
    return refusals


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer and a lineage; beside it is a text."""
    from distill.core.artifact import Lineage, write_lineage
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    folder = tmp_path_factory.mktemp("whole") / "model"
    tokenizer = train_tokenizer(["row of the text that a small model reads"] * 5, 262, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    keys = {"model_type": "llama", "max_position_embeddings": 32, "vocab_size": len(tokenizer)}
    new_model(new_config(keys | sizes), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_lineage(folder, Lineage("distill", "distill", "prune", "teacher", "org/base", None, "00ff", {"tokens": 3}))
    return folder


def test_a_whole_folder_is_refused_by_nobody(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (tmp_path / "text.jsonl").write_text('{"text": "row"}\n' * 20)
    assert read_all(folder, "whole") == []


@pytest.mark.filterwarnings("ignore")
def test_no_folder_ends_in_a_traceback_or_never(whole: Path, tmp_path: Path, capfd: Any) -> None:
    refused: list[str] = []
    for seed in range(FOLDERS):
        dice, here = random.Random(seed), tmp_path / str(seed)
        folder = Path(shutil.copytree(whole, here / "model"))
        (here / "text.jsonl").write_text('{"text": "row"}\n' * 20)
        what = dice.choices(CHANGES, (2, 1, 1, 2))[0](folder, dice)
        refused += read_all(folder, f"seed {seed}, {what}")
        shutil.rmtree(here)
    assert len(refused) > 2 * FOLDERS
    assert {line.partition(":")[0] for line in refused} == set(READERS)
