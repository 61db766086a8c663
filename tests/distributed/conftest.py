"""A run small enough to be started a hundred times, and processes that start in a blink."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.recipes import find
from tests.faults.chaos import chaos_recipe
from tests.faults.workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    with Workers() as started:
        yield started


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents whose lengths differ widely, so that ranks count different numbers of tokens."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"row {i} of a text. " + f"It says {i * i} and goes on. " * (i % 11)} for i in range(120)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def quickstart(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's recipe, on less text and for a few steps, without its controls and reports."""
    recipe: dict[str, Any] = yaml.safe_load(Path(find("quickstart")).read_text())
    recipe["data"] = {
        "train": {"kind": "jsonl", "path": str(text)},
        "sequence_length": 32,
        "validation_tokens": 300,
        "packing": "padded",
        "calibration_sequences": 8,
    }
    few = {"num_steps": 4, "batch_size": 4, "validate_every_steps": 2}
    for name in ("distill", "int4"):
        del recipe["stages"][name]["num_tokens"]
        recipe["stages"][name] |= few
    recipe["stages"]["int4"]["freeze_scales"] = 0.5
    recipe["stages"]["distill"]["save_dtype"] = "float32"  # a last bit of bf16 would be larger than the differences
    stages = {name: recipe["stages"][name] for name in ("prune", "distill", "int4")}
    recipe["stages"] = stages
    recipe["compute"] = {
        "accelerator": "cpu",
        "micro_batch_size": 1,
        "checkpoint_every_steps": 2,
        "log_every_steps": 1,
        "silence_s": 30,
    }
    recipe["logging"] = {"wandb": "disabled"}
    file = tmp_path_factory.mktemp("quickstart") / "quickstart.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


@pytest.fixture(scope="session")
def chaos(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of seconds that saves at every other step."""
    file = tmp_path_factory.mktemp("chaos") / "chaos.yaml"
    file.write_text(chaos_recipe(text))
    return file
