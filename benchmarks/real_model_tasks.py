"""Text and tasks of ``real_models``: a mixture to train on, without the items of the tasks, and eight tasks.

DATA is a folder with `books/` and `instruct/` and `gsm8k/` (see :mod:`benchmarks.chat`), `mc/` (ARC, PIQA, HellaSwag,
Winogrande as rows of query, choices and gold; context_options for Winogrande), `boolq/`, `sciq/` and `lambada/`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks import chat
from distill.core.artifact import write_text

ANSWER = "{query}\nAnswer:"
TASKS: dict[str, dict[str, Any]] = {
    "arc_easy": {"path": "mc/arc_easy.jsonl.gz", "prompt": ANSWER},
    "arc_challenge": {"path": "mc/arc_challenge.jsonl.gz", "prompt": ANSWER, "measure": "normalized_accuracy"},
    "boolq": {
        "path": "boolq/validation.jsonl.gz",
        "prompt": "{passage}\nQuestion: {question}?\nAnswer:",
        "choices": ["no", "yes"],
        "answer": "answer",
    },
    "sciq": {
        "path": "sciq/validation.jsonl.gz",
        "prompt": "Question: {question}\nAnswer:",
        "choices": ["{correct_answer}", "{distractor1}", "{distractor2}", "{distractor3}"],
        "answer": 0,
    },
    "lambada": {"kind": "cloze", "path": "lambada/lambada_openai.jsonl.gz"},
    "piqa": {"path": "mc/piqa.jsonl.gz", "prompt": "{query}Answer:", "measure": "normalized_accuracy"},
    "hellaswag": {"path": "mc/hellaswag_1k.jsonl.gz", "prompt": "{query}", "measure": "normalized_accuracy"},
    "winogrande": {
        "path": "mc/winogrande.jsonl.gz",
        "prompt": "{choice}",
        "choices": "context_options",
        "continuation": "{continuation}",
    },
}
"""Name -> settings of the task. Prompts and scores are as in lm-evaluation-harness, but SciQ has no passage."""
TEXT = {
    "lambada": "{{ context }} {{ continuation }}",
    "boolq": "{{ passage }}",
    "sciq": "{{ question }} {{ correct_answer }}",
    "winogrande": "{{ context_options[0] }} {{ continuation }}",
}
"""What is compared with the training text, where it is not the column ``query``."""


def tasks(data: Path, work: Path, limit: int, names: tuple[str, ...] = tuple(TASKS)) -> dict[str, dict[str, Any]]:
    """The ``tasks`` of an evaluate stage, with the same ``limit`` questions for every model."""
    found = {}
    for name in names:
        settings = {"kind": "multiple_choice", **TASKS[name], "limit": limit}
        file = data / settings["path"]
        found[name] = settings | {"path": str(stripped(file, work) if name == "hellaswag" else file)}
    return found


def stripped(file: Path, work: Path) -> Path:
    """A copy of HellaSwag whose choices do not begin with a space, which only some of its rows have."""
    to = work / "tasks" / file.name.removesuffix(".gz")
    with gzip.open(file, "rt", encoding="utf-8", newline="\n") as stream:
        rows = [json.loads(line) for line in stream]
    for row in rows:
        row["choices"] = [choice.strip() for choice in row["choices"]]
    write_text(to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return to


def section(data: Path, validation_tokens: int, names: tuple[str, ...] = tuple(TASKS)) -> dict[str, Any]:
    """The ``data`` section of the recipes: all tokens of conversations and novels; validation on other novels."""
    made = chat.data(data, "all")
    made["train"]["validation"] = {"books": {"kind": "jsonl", "path": str(data / "books" / "test.jsonl.gz")}}
    items = [
        {"kind": "jsonl", "path": str(data / TASKS[name]["path"]), "text": TEXT.get(name, "query")} for name in names
    ]
    made |= {"validation_tokens": validation_tokens, "calibration_sequences": 16}
    return made | {"clean": {"decontaminate": ["validation", *items]}}
