"""A student and a teacher that begin or end a text by different tokens learn from each other, and people are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.core.errors import InputError
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run
from distill.training.ends import note_of_ends

END, PAD = "<|endoftext|>", "<|pad|>"


@pytest.fixture
def models(new_teacher: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """Teacher and student; both end a text as their tokenizer does."""
    teacher = new_teacher(tmp_path / "teacher", 0)
    ids = {entry["content"]: entry["id"] for entry in _json(teacher / "tokenizer.json")["added_tokens"]}
    assert ids == {END: 0, PAD: 1}
    _change(teacher / "config.json", eos_token_id=0, bos_token_id=0)
    _change(teacher / "generation_config.json", eos_token_id=0, bos_token_id=0)
    return teacher, Path(shutil.copytree(teacher, tmp_path / "student"))


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(_json(file) | values))


def said(teacher: Path, student: Path, text: Path, tmp_path: Path, **more: Any) -> tuple[list[str], list[str]]:
    """(lines of ``check``, lines of the run) that speak of tokens."""
    distill = {"student": str(student), "num_steps": 1, "batch_size": 2} | more.pop("distill", {})
    recipe = {
        "name": "ends", "teacher": str(teacher),
        "data": {"train": {"kind": "jsonl", "path": str(text)}, "sequence_length": 16, "validation_tokens": 60}
        | more.pop("data", {}),
        "stages": more.pop("before", {}) | {"distill": distill},
        "compute": {"accelerator": "cpu"}, "logging": {"wandb": "disabled"},
    }  # fmt: skip
    loaded, lines = Recipe.from_text(yaml.safe_dump(recipe, sort_keys=False)), list[str]()
    run(loaded, tmp_path / "run", say=lines.append)
    chosen = lambda some: [line.strip() for line in some if " with token " in line or "begin with" in line]  # noqa: E731
    without = lambda some: [line for line in some if "rows begin with" not in line]  # noqa: E731 - said of any text
    return chosen(without(describe(loaded).splitlines())), chosen(without(lines))


def test_nothing_is_said_where_they_agree(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = models
    _change(student / "generation_config.json", eos_token_id=[1, 0], pad_token_id=5)  # neither matters
    assert said(teacher, student, text, tmp_path) == ([], [])


CHECKED = (
    "note: the student ends a text with token 1 '<|pad|>', the teacher with 0 '<|endoftext|>'; the student learns the "
    "end that the run's text has, which is that of data.tokenizer"
)
LEARNS = (
    "the student ends a text with token 1 '<|pad|>', the run's text with 0 '<|endoftext|>': it learns to end as the "
    "text does, and transformers does not stop there; add that token to eos_token_id in its generation_config.json, or "
    "set data.tokenizer"
)


def test_a_student_that_ends_otherwise(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = models
    _change(student / "generation_config.json", eos_token_id=1)
    assert said(teacher, student, text, tmp_path) == ([CHECKED], [LEARNS])


def test_a_cached_teacher_is_its_teacher(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = models
    _change(student / "generation_config.json", eos_token_id=1)
    before = {"cache": {"kind": "cache_teacher"}}
    assert said(teacher, student, text, tmp_path, before=before, distill={"teacher": "cache"}) == ([CHECKED], [LEARNS])


def test_a_teacher_that_ends_otherwise(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    teacher, student = models
    _change(teacher / "generation_config.json", eos_token_id=[1])
    checked, ran = said(teacher, student, text, tmp_path)
    assert checked == [
        "note: the student ends a text with token 0 '<|endoftext|>', the teacher with 1 '<|pad|>'; the student learns "
        "the end that the run's text has, which is that of data.tokenizer"
    ]
    assert ran == [
        "the teacher ends a text with token 1 '<|pad|>', the run's text with 0 '<|endoftext|>': its predictions at the "
        "end of a document teach little; set data.tokenizer: teacher, or take another teacher"
    ]


def test_a_model_whose_texts_begin_otherwise_is_refused(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    """Gemma without its <bos> predicts nonsense."""
    teacher, student = models
    tokenizer = _json(teacher / "tokenizer.json")
    one = [{"SpecialToken": {"id": PAD, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": one, "pair": [*one, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {PAD: {"id": PAD, "ids": [1], "tokens": [PAD]}},
    }  # fmt: skip
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    for number, data in enumerate(({}, {"tokenizer": str(student)})):
        with pytest.raises(InputError, match=r"tokenizer puts .* and the teacher's .*; use one tokenizer") as refused:
            said(teacher, student, text, tmp_path / str(number), data=data)
        assert "nothing" in str(refused.value)
        assert "'<|pad|>'" in str(refused.value)


@pytest.mark.parametrize(
    ("student", "teacher", "is_said"),
    [(0, 1, True), (0, 0, False), (None, 1, False), (0, None, False), ([0, 1], 1, False), ([0, 2], [1, 3], True)],
)
def test_when_a_note_is_made(student: Any, teacher: Any, is_said: bool) -> None:
    assert (note_of_ends(student, teacher) is not None) == is_said
