"""A run folder in which something else has put what is no regular file, or a recipe that nobody has written."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import InputError
from distill.core.outside import check_appendable
from distill.core.run_folder import LOCK, RECIPE, Run
from distill.data.packing import file_lock
from distill.launch import log_of
from distill.recipe import Recipe
from distill.runner import run
from distill.stages.synthesize.appended import append_lines, appended_lines
from distill.tracking.hardware import SAMPLES, HardwareLog
from tests.faults.damage import damage_material

LIMIT_S = 120
"""No file of a run takes so long; what waits for somebody who writes into a pipe waits for ever."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    teacher, text = damage_material(tmp_path_factory.mktemp("material"))
    content = {
        "name": "odd",
        "teacher": str(teacher),
        "data": {"train": {"kind": "jsonl", "path": str(text)}, "sequence_length": 16, "validation_tokens": 60},
        "stages": {
            "distill": {"student": "teacher", "num_steps": 1, "batch_size": 2},
            "evaluate": {"speed": None},
            "report": {"prompts": []},
        },
        "compute": {"accelerator": "cpu", "num_workers": 0},
        "logging": {"wandb": "disabled"},
    }
    return Recipe.model_validate(content)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe, tmp_path_factory.mktemp("runs") / "finished", say=lambda line: None).folder


class WaitsForEver(BaseException):
    """What no ``except Exception`` on the way takes."""


@contextmanager
def limited() -> Iterator[None]:
    """Fail where something waits for ever; the signal interrupts what waits in the system."""

    def end(number: int, frame: Any) -> None:
        raise WaitsForEver(f"waits for ever in {frame.f_code.co_filename}:{frame.f_lineno}")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def again(recipe: Recipe, folder: Path, **more: Any) -> str:
    """What a further call says; a refusal is one line."""
    lines: list[str] = []
    with limited():
        try:
            run(recipe, folder, say=lines.append, **more)
        except InputError as error:
            lines.append(f"refused: {error}")
    assert all("\n" not in line for line in lines)
    return "\n".join(lines)


UNREAD = {"INPUT", "rows.json", "answers.json", "metrics.csv", "metrics.jsonl", SAMPLES, LOCK, ".lock"}
UNREAD |= {"report.md", "table.csv", "perplexity_against_weight_bytes.png"}
"""Files of a finished run that a further call need not read, as all stages are finished."""
ODD_RECIPES = {
    "nested": "[" * 3000,
    "a timestamp": "a: !!timestamp foo\n",
    "an int": "a: !!int 1x\n",
    "a list": "[1, 2]\n",
    "aliases": "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "no text": "\udcff",
}


@pytest.mark.parametrize("kind", [*ODD_RECIPES, "pipe", "device", "folder link"])
def test_an_odd_recipe_in_the_run_folder(kind: str, recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    file = folder / RECIPE
    file.unlink()
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "folder link":
            file.symlink_to(tmp_path / "gone")
        case _:
            file.write_bytes(ODD_RECIPES[kind].encode("utf-8", "surrogateescape"))
    said = again(recipe, folder)
    assert said.count("finished before") == 3, said
    assert "changed since it last ran" not in said
    assert file.is_file()
    assert not file.is_symlink()
    assert file.read_bytes() == (finished / RECIPE).read_bytes()


def test_a_pipe_in_place_of_any_file_of_a_run_ends_it_or_is_replaced(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    files = [file.relative_to(finished) for file in sorted(finished.rglob("*")) if file.is_file()]
    assert {LOCK, RECIPE, SAMPLES, ".lock", "metrics.jsonl", "DONE"} <= {file.name for file in files}
    unread = set()
    for name in files:
        folder = Path(shutil.copytree(finished, tmp_path / "run"))
        (folder / name).unlink()
        os.mkfifo(folder / name)
        said = again(recipe, folder, start="evaluate" if name.parts[0] == "data" or "model" in name.parts else None)
        if "refused" not in said and not (folder / name).is_file():
            unread.add(name.name)
        shutil.rmtree(folder)
    assert unread <= UNREAD


def test_what_is_written_on_is_a_regular_file(tmp_path: Path) -> None:
    pipe = tmp_path / LOCK
    os.mkfifo(pipe)
    with limited():
        with pytest.raises(InputError, match="is a named pipe, expected a regular file"), Run(tmp_path).lock():
            raise AssertionError("locked")
        with pytest.raises(InputError, match="is a named pipe, expected a regular file"), file_lock(tmp_path):
            raise AssertionError("locked")
        assert Run(tmp_path).is_worked_at() is False
        with pytest.raises(InputError, match="is a named pipe, expected a regular file"):
            append_lines(pipe, [{"a": 1}])
        with pytest.raises(InputError, match="is a named pipe, expected a regular file"):
            list(appended_lines(pipe, dict, "make it again"))
    check_appendable(log_of(tmp_path, 1))  # nothing is there
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(InputError, match="a link that leads nowhere"):
        check_appendable(tmp_path / "link")


def test_the_log_of_the_machine_is_a_regular_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / SAMPLES)
    log = HardwareLog(tmp_path / SAMPLES)
    with limited():
        log.start()
        log.stop()
    told = f"{tmp_path / SAMPLES}: is a named pipe, expected a regular file"
    assert told in capfd.readouterr().err
