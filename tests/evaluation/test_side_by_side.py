"""Greedy answers beside each other, and the mark on the first token that differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.core.errors import InputError
from distill.evaluation.side_by_side import Answer, first_difference, side_by_side


def test_answers_are_greedy_and_marked(tiny_folders: list[Path]) -> None:
    models = {"teacher": tiny_folders[0], "same": tiny_folders[0], "other": tiny_folders[1]}
    (row,) = side_by_side(models, ["def f("], new_tokens=6, dtype="float32", simulated=["other"])
    answers = row["answers"]
    assert row["prompt"] == "def f("
    assert list(answers) == list(models)
    assert answers["same"]["mark"] is None
    assert answers["same"]["text"] == answers["teacher"]["text"]
    assert answers["other"]["text"] != answers["teacher"]["text"]
    assert answers["other"]["mark"][0] >= 0
    assert answers["other"]["seconds"] is None
    assert answers["teacher"]["seconds"] > 0

    model = AutoModelForCausalLM.from_pretrained(tiny_folders[0], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folders[0])
    ids = tokenizer("def f(", return_tensors="pt").input_ids
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert answers["teacher"]["text"] == tokenizer.decode(ids[0, 6:])
    assert answers["teacher"]["tokens"] == 6


@pytest.mark.parametrize(
    ("text", "ends", "mark"),
    [
        ("a file", [2, 6], None),
        ("a book", [2, 6], [2, 6]),
        ("a fire", [2, 6], [2, 6]),  # differs inside the second token: all of that is marked
        ("a", [1], [1, 1]),  # stops early
        ("a file!", [2, 6, 7], [6, 7]),  # goes on longer
        ("", [], [0, 0]),
    ],
)
def test_first_difference(text: str, ends: list[int], mark: list[int] | None) -> None:
    assert first_difference("a file", Answer(text, ends, 0.1)) == mark


def test_mistakes(tiny_folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        side_by_side({"t": tiny_folders[0]}, [[{"role": "user", "content": "hi"}]])
    with pytest.raises(InputError, match="no tokens"):
        side_by_side({"t": tiny_folders[0]}, [""])
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        side_by_side({"t": tmp_path}, ["x"])
