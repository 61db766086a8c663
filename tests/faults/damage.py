"""Damages the files of a finished run, one at a time, and looks at what the commands make of each.

A command may make again what was damaged, refuse to go on with one line, name the file and go on without it, or not
read it at all, which what it makes must show. Anything else is a silent acceptance.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.compare import answer_prompts, report_runs
from distill.core.errors import DistillError
from distill.core.run_folder import CHECKPOINTS, DONE, INPUT
from distill.recipe import Recipe
from distill.runner import run

Outcome = Literal["made again", "refused", "told", "not read", "silent", "traceback"]
COMMANDS = ("run", "run --from the next stage", "report", "compare")
CHANGING = {
    *(DONE, INPUT, "distill.json", "metrics.jsonl", "metrics.csv"),
    *("README.md", "report.md", "index.html", "table.csv", "load.png"),
}
"""Files that differ between two runs of one recipe: they hold dates, times, or what a run is called."""
MEASURED = {"training_seconds", "seconds"}
"""Keys in JSON whose values differ between two runs."""
SAMPLE = "row"


@dataclass(frozen=True)
class Case:
    """One fault of one file under one command.

    Attributes:
        file: path within the run folder; of a file that is added, its own.
        fault: key of :data:`FAULTS`.
        command: of :data:`COMMANDS`.
        outcome: what came of it.
        said: the refusal, or the line that names the file.
    """

    file: str
    fault: str
    command: str
    outcome: Outcome
    said: str = ""


def _keeping_time(file: Path, content: bytes) -> None:
    """As a disk does it: nothing but the content tells."""
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _flipped(file: Path, dice: random.Random, others: list[Path]) -> bool:
    content = bytearray(file.read_bytes())
    if content:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        _keeping_time(file, bytes(content))
    return bool(content)


def _noise(file: Path, dice: random.Random, others: list[Path]) -> bool:
    content = file.read_bytes()
    _keeping_time(file, dice.randbytes(len(content)))
    return bool(content)


def _cut(file: Path, dice: random.Random, others: list[Path]) -> bool:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return bool(content)


def _gone(file: Path, dice: random.Random, others: list[Path]) -> bool:
    file.unlink()
    return True


def _edited(file: Path, dice: random.Random, others: list[Path]) -> bool:
    """Another digit in one number of a text."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    numbers = [match.end() - 1 for match in re.finditer(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", text)]
    if not numbers:
        return False
    at = dice.choice(numbers)
    file.write_text(f"{text[:at]}{(int(text[at]) + dice.randint(1, 9)) % 10}{text[at + 1 :]}", encoding="utf-8")
    return True


def _another(file: Path, dice: random.Random, others: list[Path]) -> bool:
    """The file of the same name that another stage left."""
    differing = [other for other in others if other.read_bytes() != file.read_bytes()]
    if differing:
        shutil.copy2(dice.choice(differing), file)
    return bool(differing)


FAULTS: dict[str, Callable[[Path, random.Random, list[Path]], bool]] = {
    "one bit flipped": _flipped,
    "other bytes, same size": _noise,
    "cut in half": _cut,
    "gone": _gone,
    "one number edited": _edited,
    "another stage's file": _another,
}
ADDED = "a file added"


@dataclass
class Damages:
    """A run that is damaged again and again, each time in a copy.

    Attributes:
        recipe: of the run; its last stage but one depends on all before.
        finished: folder of the run, which is left as it is.
        folder: where copies go.
        undisturbed: what each command makes of a run that nothing happened to.
        done: file, fault and command of the cases that :meth:`cases` leaves out.
    """

    recipe: Recipe
    finished: Path
    folder: Path
    undisturbed: dict[str, Any] = field(default_factory=dict)
    done: Collection[tuple[str, str, str]] = ()

    def cases(self, commands: tuple[str, ...] = COMMANDS) -> Iterator[Case]:
        """Every fault of every file under every command that may read it."""
        files = sorted(file for file in self.finished.rglob("*") if file.is_file() and file.name != ".lock")
        for file in files:
            for fault in FAULTS:
                yield from self.under(file.relative_to(self.finished), fault, commands)
        for place in sorted({file.parent for file in files} - {self.finished}):
            yield from self.under(place.relative_to(self.finished) / "adapter_config.json", ADDED, commands)

    def under(self, file: Path, fault: str, commands: tuple[str, ...]) -> Iterator[Case]:
        """One fault of one file under every command that may read it."""
        for command in commands:
            start = self._next(file)
            if (command == COMMANDS[1] and start is None) or (command == COMMANDS[3] and "model" not in file.parts):
                continue
            if (str(file), fault, command) in self.done:
                continue
            copy = self._copy()
            if not self._damage(copy / file, fault, is_touched=command == COMMANDS[0]):
                return
            yield self._look(copy, file, fault, command, start)

    def _copy(self) -> Path:
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        return Path(shutil.copytree(self.finished, copy))

    def _damage(self, file: Path, fault: str, *, is_touched: bool) -> bool:
        """Do it; False where the file cannot have this fault."""
        if fault == ADDED:
            file.write_text("{}")
            return True
        others = [other for other in self.finished.rglob(file.name) if other.is_file()]
        done = FAULTS[fault](file, random.Random(f"{file.name} {fault}"), others)
        if done and is_touched and file.exists():
            os.utime(file)  # what nothing reads is looked at only when it was written to
        return done

    def _next(self, file: Path) -> str | None:
        """The stage after the one that left a file, which may read it."""
        names = list(self.recipe.stages)
        if file.parts[0] not in names:
            return names[0]
        after = names[names.index(file.parts[0]) + 1 :]
        return after[0] if after else None

    def _look(self, copy: Path, file: Path, fault: str, command: str, start: str | None) -> Case:
        said: list[str] = []
        damaged = _bytes(copy / file)
        try:
            made = self._do(copy, command, start, said.append)
        except DistillError as error:
            return Case(str(file), fault, command, "refused", str(error).replace(str(copy), "RUN"))
        except Exception as error:
            return Case(str(file), fault, command, "traceback", f"{type(error).__name__}: {error}")
        within = str(Path(*file.parts[1:]))
        naming = [line for line in said if str(copy / file) in line or f"changed since: {within}" in line]
        if naming:
            outcome: Outcome = "made again" if "what is left of it is now" in naming[0] else "told"
            return Case(str(file), fault, command, outcome, naming[0].replace(str(copy), "RUN"))
        is_as_before = (self.finished / file).is_file() and _content(copy / file) == _content(self.finished / file)
        if is_as_before and _bytes(copy / file) != damaged:
            return Case(str(file), fault, command, "made again")
        return Case(str(file), fault, command, "not read" if made == self._expected(command, start) else "silent")

    def _expected(self, command: str, start: str | None) -> Any:
        key = f"{command} {start}" if command == COMMANDS[1] else command
        if key not in self.undisturbed:
            self.undisturbed[key] = self._do(self._copy(), command, start, lambda line: None)
        return self.undisturbed[key]

    def _do(self, copy: Path, command: str, start: str | None, say: Callable[[str], None]) -> Any:
        """What a command makes or says, without what differs from run to run."""
        if command == COMMANDS[3]:
            return answer_prompts(copy, [SAMPLE], new_tokens=2)
        if command == COMMANDS[2]:
            table, page = report_runs([copy], copy / "comparison")
            say(table)
            return {"table": table} | _made(page.parent)
        first = start if command == COMMANDS[1] else None
        run(self.recipe, copy, start=first, say=say)
        names = list(self.recipe.stages)
        return {name: _made(copy / name) for name in (names[names.index(first) :] if first else [])}


def _made(folder: Path) -> dict[str, Any]:
    """What a folder holds, without what differs from run to run."""
    return {
        str(file.relative_to(folder)): _content(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in CHANGING and CHECKPOINTS not in file.parts
    }


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _content(file: Path) -> Any:
    if not file.is_file():
        return None
    content = file.read_bytes()
    try:
        if file.suffix == ".safetensors":  # its library writes the metadata in any order
            size = int.from_bytes(content[:8], "little")
            return json.loads(content[8 : 8 + size]), content[8 + size :]
        return _without_times(json.loads(content)) if file.suffix == ".json" else content
    except ValueError:
        return content


def _without_times(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_times(value) for key, value in content.items() if key not in MEASURED}
    return [_without_times(value) for value in content] if isinstance(content, list) else content


def damage_recipe(teacher: Path, text: Path) -> Recipe:
    """A recipe whose stages leave every kind of file that a later one reads: seconds of work.

    Args:
        teacher: folder of a tiny model.
        text: a JSONL file.
    """
    grids = {"quantizer": {"kind": "int_group", "group_size": 16}, "mixed": {"also": ["int8_channel"], "bits": 7}}
    budget = {"non_embedding_parameters": "90%", "tolerance": 0.3}
    search = {"budget": budget, "axes": ["intermediate_size"], "multiple_of": {"intermediate_size": 16}}
    content = {
        "name": "damaged",
        "teacher": str(teacher),
        "data": {
            "train": {"kind": "jsonl", "path": str(text)},
            "sequence_length": 16,
            "validation_tokens": 60,
            "calibration_sequences": 4,
        },
        "stages": {
            "base": {"kind": "prune", "search": search},
            "cache": {"kind": "cache_teacher"},
            "student": {"kind": "distill", "student": "base", "teacher": "cache", "num_steps": 1, "batch_size": 2},
            "low": {"kind": "quantize", "student": "student", "num_tokens": 0} | grids,
            "evaluate": {"speed": None},
            "export": {"model": "student"},
            "report": {"prompts": [SAMPLE], "new_tokens": 2},
        },
        "compute": {"accelerator": "cpu"},
        "logging": {"wandb": "disabled"},
    }
    return Recipe.model_validate(content)


def damage_material(folder: Path) -> tuple[Path, Path]:
    """A tiny teacher and its text.

    Args:
        folder: where they go.

    Returns:
        The teacher's folder and the JSONL file.
    """
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    teacher, text = folder / "teacher", folder / "text.jsonl"
    rows = [f"row {i} of the text that a small model reads, and {i * i} more words" for i in range(40)]
    tokenizer = train_tokenizer(rows, 270, teacher)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    new_model(new_config(keys | sizes | {"vocab_size": len(tokenizer)}), seed=0).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return teacher, text
