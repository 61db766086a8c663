"""`check` says how long a large text takes to tokenize, by a measurement, and how much room its tokens need."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from distill.data.spec import DataSpec
from distill.forecast import describe, text, tokenizing
from distill.forecast.tokenizing import Rates, about_tokenizing, rates_of
from distill.recipe import Recipe


def test_rates_are_measured_on_texts_and_need_some() -> None:
    texts = [f"the quick brown fox number {number} jumps" for number in range(300)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    rates = rates_of(tokenizer, texts)
    assert rates is not None
    assert min(rates.encoding, rates.splitting) > 1000
    assert rates.bytes_per_id == 2
    assert rates_of(tokenizer, texts[:1]) is None


@pytest.mark.parametrize(
    ("processes", "machines", "expected"),
    [
        (1, 1, "about 73 minutes by one process on this machine"),
        (2, 1, "about 37 minutes by 2 processes on this machine"),
        (8, 4, "about 2 minutes by 8 processes on each of 4 machines like this one"),
    ],
)
def test_a_billion_tokens(monkeypatch: pytest.MonkeyPatch, processes: int, machines: int, expected: str) -> None:
    monkeypatch.setattr(tokenizing, "num_processes", lambda: processes)
    (line,) = about_tokenizing(1e9, 4.0, Rates(1e6, 1e7, 2), machines)
    assert expected in line
    assert "2.0 GB in the run's data folder, twice as much for a moment" in line


def test_little_is_said_of_little_text() -> None:
    assert list(about_tokenizing(1e6, 4.0, Rates(1e6, 1e7, 2))) == []
    assert list(about_tokenizing(1e9, 4.0, None)) == []


def test_a_stream_is_on_disk_in_part() -> None:
    data = DataSpec.model_validate({"train": {"kind": "hub", "path": "a/b", "streaming": True}, "sequence_length": 8})
    line, unknown = text.lines(text.TextForecast(None, None), data)
    assert "at most about 234.9 MB of its rows are in the run's data folder" in line
    assert unknown == "how many tokens it has is known when it is read"


def test_it_stands_in_the_plan(tmp_path: Path, tiny_folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps. " * 20_000)
    (tmp_path / "recipe.yaml").write_text(
        f"name: long\nteacher: {tiny_folders[0]}\ndata:\n"
        f"  train: {{kind: text_files, path: {tmp_path}/text.txt}}\n  sequence_length: 32\n"
        f"stages:\n  distill: {{student: {tiny_folders[1]}, num_steps: 2}}\n"
    )
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert "tokenized once" not in describe(recipe)
    monkeypatch.setattr(text, "LONG_BYTES", 1000)
    monkeypatch.setattr(tokenizing, "LONG_BYTES", 1000)
    assert "tokenized once, before the first stage that reads it: about" in describe(recipe)
